// Colours of jobs: by setting, by a key, or by the rank of their loss

const dark = matchMedia("(prefers-color-scheme: dark)");
let colours, ink, faint, line, paper;

function readColours() {
  const style = getComputedStyle(document.documentElement);
  [ink, faint, line, paper] = ["--ink", "--faint", "--line", "--paper"].map(name => style.getPropertyValue(name));
  colours = data.colours[dark.matches ? "dark" : "light"];
}

function share(place, count) {
  return count > 1 ? place / (count - 1) : 0;
}

function ramp(share) {
  const place = share * (colours.ramp.length - 1);
  const before = Math.min(Math.floor(place), colours.ramp.length - 2);
  const [from, to] = [before, before + 1].map(number => parseInt(colours.ramp[number].slice(1), 16));
  const mixed = [16, 8, 0].map(bits =>
    Math.round((from >> bits & 255) + ((to >> bits & 255) - (from >> bits & 255)) * (place - before)));
  return "rgb(" + mixed + ")";
}
const colourChoice = document.querySelector("[name=colour]");

function fillColourChoice() {
  if (groups.length <= data.few) colourChoice.add(new Option("by setting", "setting"));
  if (groups.length > 1) keys.forEach((key, number) => colourChoice.add(new Option("by " + key.name, number)));
  if (finished.length) colourChoice.add(new Option("by final " + measure().title, "loss"));
  if (groups.length > data.few && finished.length) colourChoice.value = "loss";
}

function colourByKey(number) {
  const key = keys[number];
  const kinds = !key.numeric && key.values.length <= data.few;
  const shades = key.values.map((_, place) => kinds ? colours.kinds[place] : ramp(share(place, key.values.length)));
  jobs.forEach(job => { job.colour = shades[key.values.indexOf(job.values[number])] ?? faint; });
  return key.values.length > data.few
    ? { scale: key.name, labels: [key.values[0], key.values.at(-1)].map(value => tickText(key, value)) }
    : { chips: key.values.map((value, place) => [key.name + "=" + tickText(key, value), shades[place]]) };
}

function colourBySetting() {
  if (keys.length == 1 && keys[0].numeric && groups.length > 1) return colourByKey(0);
  jobs.forEach(job => { job.colour = colours.kinds[job.group]; });
  const chips = groups.map(({ title, text }, number) => [title, colours.kinds[number], text]);
  return { chips: chips.filter(([, , text]) => text == textShown) };
}

function colourByLoss() {
  jobs.forEach(job => { job.colour = faint; });
  for (const number of lossOrder) jobs[number].colour = ramp(jobs[number].lossShare);
  const at = part => jobs[lossOrder[Math.round(part * (lossOrder.length - 1))]].loss.toFixed(3);
  if (!lossOrder.length) return {};
  return { scale: "final " + measure().title + ", by rank",
    labels: ["best " + at(0), "worst " + at(1) + " (median " + at(0.5) + ")"] };
}

function colourJobs() {
  const by = colourChoice.value;
  const { chips, scale, labels } =
    by == "setting" ? colourBySetting() : by == "loss" ? colourByLoss() : colourByKey(Number(by));
  const legend = byId("legend");
  legend.replaceChildren();
  if (groups.length == 1) return;
  for (const [text, colour] of chips ?? []) {
    const chip = add(legend, "span");
    add(chip, "i").style.background = colour;
    chip.append(text);
  }
  if (scale) {
    add(legend, "span", scale + ": " + labels[0]);
    const bar = add(add(legend, "span"), "i", "", { class: "ramp" });
    bar.style.background = "linear-gradient(to right," + colours.ramp + ")";
    add(legend, "span", labels[1]);
  }
}
