// The columns of the tables: means over the jobs of each row, whatever has been measured of them

const TITLES = { val_bits_per_byte: "bits/byte", last_evaluated: "last evaluated", tokens_seen: "tokens",
  seconds: "train time", tokens_per_second: "tokens/s" };  // other figures have their names, with spaces
const REDUNDANT = "val_perplexity";  // follows from the loss
const METRICS = [...new Set(jobs.flatMap(job => Object.keys(job.figures)))].filter(name =>
  name.startsWith("val_") && name != "val_loss" && name != REDUNDANT);
const jobsOfGroup = groups.map((_, group) => [...jobs.keys()].filter(number => jobs[number].group == group));

function groupColumns() {
  const firsts = jobsOfGroup.map(numbers => jobs[numbers[0]]);
  const finished = jobsOfGroup.map(numbers => figuresOf("val_loss", numbers).length);
  const before = groups.map(group => groups.findIndex(other => other.text == group.text));  // the best of its text
  const rank = group => finished[group] ? String(group - before[group] + 1) : "–";
  return [
    { name: "rank", cells: groups.map((_, group) => [group, rank(group)]) },
    ...textColumn(groups),
    ...settingColumns(firsts.map(({ setting: { seed, ...others } }) => others)),
    { name: "n", cells: jobsOfGroup.map(({ length }, group) =>
      [finished[group], finished[group] + (finished[group] < length ? " of " + length : "")]) },
    ...verdictColumns(),
    ...lossColumns(jobsOfGroup, jobs.some(job => job.loss === null)),
    ...speedColumns(jobsOfGroup),
  ];
}

// Whether a setting may be the best, and a dot for each of its seeds, where any has several.
function verdictColumns() {
  if (groups.every(group => group.possibly_best === null)) return [];
  const answers = groups.map(group => ({ true: [0, "yes"], false: [2, "no"] })[group.possibly_best] ?? [1, "–"]);
  return [
    { name: "may be best", cells: answers },
    { name: "seeds", cells: groups.map((_, group) => [group, dotsOf(group)]), text: true },
  ];
}

// Where the dots of a text's settings lie: from its lowest final figure to that of the usual setting.
const dotScales = data.texts.map(({ measure, noise }, text) => {
  const found = [...groups.keys()].filter(group => groups[group].text == text)
    .map(group => figuresOf(measure.name, jobsOfGroup[group])).filter(values => values.length);
  if (!found.length) return null;
  const best = mean(found[0]), usual = mean(found[found.length >> 1]);
  const low = Math.min(...found.flat(), best - noise), high = Math.max(...found[0], usual + noise, best + 4 * noise);
  return { best, high, place: value => 100 * Math.min(1, (value - low) / (high - low || 1)) + "%" };
});

// A strip with a dot for each seed, and the noise of seeds about the lowest mean as a band. What lies beyond is a ring
// at its end.
function dotsOf(group) {
  const { measure, noise } = data.texts[groups[group].text], scale = dotScales[groups[group].text];
  if (!scale) return "–";
  const { best, high, place } = scale;
  const strip = document.createElement("div");
  strip.className = "dots";
  if (noise) {
    const band = add(strip, "i", "", { class: "band" });
    band.style.left = place(best - noise);
    band.style.right = "calc(100% - " + place(best + noise) + ")";
  }
  for (const number of jobsOfGroup[group]) {
    const value = jobs[number].figures[measure.name] ?? null, { seed } = jobs[number].setting;
    if (value === null) continue;
    const title = value.toFixed(4) + (seed === undefined ? "" : " with seed " + seed);
    add(strip, "i", "", { title, class: value > high ? "beyond" : "dot" }).style.left = place(value);
  }
  return strip;
}

function jobColumns() {
  const alone = jobs.map((_, number) => [number]);
  return [
    { name: "job", cells: jobs.map((job, number) => [number, job.name]) },
    ...textColumn(jobs),
    ...settingColumns(jobs.map(job => job.setting)),
    { name: "state", cells: jobs.map(job => [job.state, job.state]), text: true },
    ...lossColumns(alone, true),
    figureColumn("steps", alone, whole),
    figureColumn("tokens_seen", alone, whole),
    ...speedColumns(alone),
  ];
}

// Which text the figures of a row are of, where there are several.
function textColumn(rows) {
  const names = rows.map(({ text }) => data.texts[text].title.split(" (")[0]);
  return data.texts.length > 1 ? [{ name: "text", cells: names.map(name => [name, name]), text: true }] : [];
}

function lossColumns(rows, withLast) {
  return ["val_loss", ...METRICS, "train_loss", ...(withLast ? ["last_evaluated"] : [])].map(name =>
    figureColumn(name, rows, spread));
}

function speedColumns(rows) {
  return [figureColumn("seconds", rows, duration), figureColumn("tokens_per_second", rows, whole)];
}

function figureColumn(name, rows, shown) {
  return {
    name: TITLES[name] ?? name.replaceAll("_", " "),
    cells: rows.map(row => figuresOf(name, row)).map(there =>
      there.length ? [mean(there), shown(there)] : [null, "–"]),
  };
}

function figuresOf(name, numbers) {
  return numbers.map(number => jobs[number].figures[name] ?? null).filter(value => value !== null);
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function spread(values) {  // with the sample standard deviation where there is more than one
  const middle = mean(values), squares = values.map(value => (value - middle) ** 2);
  const deviation = Math.sqrt(squares.reduce((sum, square) => sum + square, 0) / (values.length - 1));
  return middle.toFixed(3) + (values.length > 1 ? " ± " + deviation.toFixed(3) : "");
}

function whole(values) {
  return Math.round(mean(values)).toLocaleString("en");
}

function duration(values) {
  const seconds = Math.round(mean(values)), minutes = Math.floor(seconds / 60);
  const two = number => String(number).padStart(2, "0");
  return seconds < 60 ? seconds + "s" : minutes < 60 ? minutes + "m" + two(seconds % 60) + "s"
    : Math.floor(minutes / 60) + "h" + two(minutes % 60) + "m";
}
