// The page of a sweep: everything but what the charts draw

const PROBLEMS = [  // states of jobs without final figures
  ["failed", "failed"],
  ["stopped early", "stopped"],
  ["interrupted or killed", "interrupted", "killed"],
  ["running: figures are those so far", "running"],
  ["waiting", "waiting"],
];

function addProblems(parent) {
  for (const [title, ...states] of PROBLEMS) {
    const there = jobs.filter(job => states.includes(job.state));
    if (!there.length) continue;
    const details = add(parent, "details");
    details.open = there.length <= data.few;
    add(details, "summary", there.length + " " + title);
    const list = add(details, "ul", "", { class: "reasons" });
    for (const job of there)
      add(list, "li", "Job " + job.name + " (" + job.title + ")" + (job.reason && ": " + job.reason));
  }
}

function addBest(parent) {
  data.texts.forEach(({ measure, title }, text) => {
    const best = groups.findIndex(group => group.text == text), line = add(parent, "div");
    const found = figuresOf(measure.name, jobsOfGroup[best]);
    const on = title && " on " + title;
    if (!found.length) {
      line.append("No job has a final " + measure.title + on + " yet.");
      return;
    }
    line.append("Lowest " + measure.title + on + ": ");
    add(line, "b", spread(found));
    if (groups.length > 1) line.append(" with "), add(line, "b", groups[best].title);
    if (found.length > 1) line.append(", n = " + found.length);
  });
}

function addNotes(parent) {
  if (data.texts.length > 1)
    add(parent, "p", "The jobs were evaluated on " + data.texts.length + " different texts, or parts of one, which do " +
      "not compare: jobs are ranked and drawn text by text. training.final_eval=full evaluates all of a text.",
      { class: "note" });
  if (data.texts.some(text => !text.per_token))
    add(parent, "p", "The jobs have different tokenizers. Losses of different tokenizers do not compare: jobs are " +
      "ranked and drawn by bits per byte, and their training losses, which are per token, are not drawn.", { class: "note" });
}

function addLossMap(parent, { grid, measure, title }, text) {
  const figure = add(parent, "figure", "", { "data-text": text });
  const caption = add(figure, "figcaption");
  add(caption, "b", "Mean final " + measure.title + " over two keys");
  caption.append((title && " on " + title) + " the bluer, the lower (by rank); ★ may be the best; a cell shows its jobs in the charts");
  const titles = groups.map(group => group.title);
  Object.assign(marks.cells, addHeatmap(figure, grid, groups.map(group => group.cell), titles, pressGroup));
}

// Show the jobs of another text in all charts.
function chooseText(text) {
  showText(text);
  byId("text").value = text;
  for (const name of ["smooth", "raw"])  // of losses that do not compare
    document.querySelector("[name=" + name + "]").parentElement.hidden = !data.texts[text].per_token;
  document.querySelectorAll("[data-text]").forEach(each => { each.hidden = each.dataset.text != text; });
  brushes.clear();
  select();
  recolour();
}

function pressGroup(group) {
  press(jobsOfGroup[group]);
}

function addSamples(parent) {
  for (const sample of data.samples) {
    const article = add(parent, "article"), job = jobs[sample.job];
    const heading = add(article, "h3", sample.place + ", " + nameOf(job) + " ");
    add(heading, "small", data.texts[job.text].measure.title + " " + job.loss.toFixed(3));
    addSample(article, sample);
  }
  if (!data.samples.length) add(parent, "p", "No job has finished yet.");
}

function addCommands(parent) {
  for (const job of jobs) {
    const item = add(parent, "li"), about = add(item, "p", "Job " + job.name + ": " + job.title + " ");
    add(about, "small", "(" + job.state + ")");
    addCommand(item, job);
    if (job.resume) add(item, "code", job.resume);
    if (job.state == "finished") add(item, "small", "it is finished: add a higher limit, as training.max_steps=…");
  }
}

function recolour() {
  readColours();
  colourJobs();
  redraw();
}

document.title = data.kind + " " + data.folders;
byId("kind").textContent = data.kind;
byId("folders").textContent = data.folders;
byId("about").textContent = data.about;
addBest(byId("best"));
addNotes(byId("notes"));
data.texts.forEach(({ title }, text) => byId("text").add(new Option(title, text)));
byId("text").parentElement.hidden = data.texts.length == 1;
byId("text").addEventListener("change", event => chooseText(Number(event.target.value)));
addProblems(byId("problems"));
addFacts(byId("varied"), data.varied);
if (!data.varied.length) byId("varied").replaceWith(jobs.length > 1 ? "Nothing." : "Nothing: it is one run.");
addFacts(byId("common"), data.common);
byId("smoothed").textContent = "1/" + data.smoothed_share;
marks.jobs = addTable(byId("jobs"), "all jobs", jobColumns(), number => press([number]));
addSamples(byId("samples"));
byId("all-unfinished").hidden = !data.resume.length;
for (const command of data.resume) add(byId("all-unfinished"), "code", command);
addCommands(byId("commands"));
document.querySelectorAll(".readout").forEach(readout => { readout.textContent = HINT; });

fillColourChoice();
addChart(byId("curves"), innerWidth < 600 ? 340 : 460, drawCurves);
byId("verdict").hidden = groups.every(group => group.possibly_best === null);
if (keys.length && finished.length && jobs.length > 1) {
  marks.groups = addTable(byId("ranked"), "settings, ranked", groupColumns(), pressGroup);
  keys.forEach((_, number) => addValues(number));
  data.texts.forEach((text, number) => text.grid && addLossMap(byId("values"), text, number));
  addParallel();
} else byId("by-value").hidden = true;
chooseText(0);
if (data.scaling) addScaling();
document.querySelectorAll(".controls input").forEach(input => {
  if (input.type == "checkbox") input.checked = view[input.name];
  input.addEventListener("change", () => {
    view[input.name] = input.type == "radio" ? input.value : input.checked;
    charts[0].redraw();
  });
});
colourChoice.addEventListener("change", recolour);
dark.addEventListener("change", recolour);
let seenWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth != seenWidth) redraw();  // a phone hides its address bar all the time
  seenWidth = innerWidth;
});
