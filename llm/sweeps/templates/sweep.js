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
  const losses = figuresOf("val_loss", jobsOfGroup[0]);
  if (!losses.length) {
    parent.append("No job has a final validation loss yet.");
    return;
  }
  parent.append("Lowest validation loss: ");
  add(parent, "b", spread(losses));
  if (groups.length > 1) parent.append(" with "), add(parent, "b", groups[0].title);
  if (losses.length > 1) parent.append(", n = " + losses.length);
}

function addLossMap(parent) {
  const figure = add(parent, "figure");
  const caption = add(figure, "figcaption");
  add(caption, "b", "Mean validation loss over two keys");
  caption.append(" the bluer, the lower (by rank); a cell shows its jobs in the charts");
  const titles = groups.map(group => group.title);
  marks.cells = addHeatmap(figure, data.grid, groups.map(group => group.cell), titles, pressGroup);
}

function pressGroup(group) {
  press(jobsOfGroup[group]);
}

function addSamples(parent) {
  for (const sample of data.samples) {
    const article = add(parent, "article"), job = jobs[sample.job];
    const heading = add(article, "h3", sample.place + ", " + nameOf(job) + " ");
    add(heading, "small", "validation loss " + job.loss.toFixed(3));
    addSample(article, sample);
  }
  if (!data.samples.length) add(parent, "p", "No job has finished yet.");
}

function addCommands(parent) {
  for (const job of jobs) {
    const item = add(parent, "li"), about = add(item, "p", "Job " + job.name + ": " + job.title + " ");
    add(about, "small", "(" + job.state + ")");
    addCommand(item, job.again);
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
if (keys.length && lossOrder.length && jobs.length > 1) {
  marks.groups = addTable(byId("ranked"), "settings, ranked", groupColumns(), pressGroup);
  keys.forEach((_, number) => addValues(number));
  if (data.grid) addLossMap(byId("values"));
  addParallel();
} else byId("by-value").hidden = true;
recolour();
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
