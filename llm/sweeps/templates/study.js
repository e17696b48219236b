// The page of a study: heatmaps, and the samples of the setting that was chosen

const { jobs } = data;
const panel = byId("samples");
const maps = [];  // the cells of each heatmap, by the job's number

function show(number) {
  for (const cells of maps) cells.forEach((cell, other) => cell.setAttribute("aria-pressed", other == number));
  panel.replaceChildren();
  panel.scrollTop = 0;
  add(panel, "h2", nameOf(jobs[number]), { role: "status" });
  if (jobs[number].error) add(panel, "p", jobs[number].error, { class: "failed" });
  if (jobs[number].copy) add(panel, "p", jobs[number].copy, { class: "copy" });
  for (const sample of jobs[number].samples) {
    const article = add(panel, "article");
    addSample(article, sample);
    add(article, "div", sample.note, { class: "figures" });
  }
}

function press(number) {
  show(number);
  const { top, bottom } = panel.getBoundingClientRect();
  if (top > innerHeight || bottom < 0) panel.scrollIntoView();  // below on a phone, above from the table
}

function nameOf(job) {
  return "Job " + job.name + ": " + job.title;
}

document.title = "Sampling study " + data.folders;
byId("subject").textContent = data.subject;
byId("about").textContent = data.folders + " · " + data.about;
for (const note of data.notes) add(byId("problems"), "p", note);
for (const job of jobs.filter(job => job.error))
  add(byId("problems"), "p", "Job " + job.name + " (" + job.title + ") failed: " + job.error, { class: "failed" });
byId("maps").style.setProperty("--map", 7 + 3.5 * data.grids[0].columns.length + "rem");  // wide enough for all
for (const metric of data.metrics) {
  const figure = add(byId("maps"), "figure");
  const caption = add(figure, "figcaption");
  add(caption, "b", metric.title);
  caption.append(" " + metric.meaning);
  const titles = jobs.map(job => metric.title + ", " + job.title);
  for (const grid of data.grids) maps.push(addHeatmap(figure, grid, metric.cells, titles, press));
}
addTable(byId("settings"), "all settings", [
  { name: "job", cells: jobs.map((job, number) => [number, job.name]) },
  ...settingColumns(jobs.map(job => job.setting)),
  ...data.metrics.map(metric => ({ name: metric.title, cells: metric.cells })),
], press);
for (const job of jobs) {
  const item = add(byId("commands"), "li");
  add(item, "p", nameOf(job));
  addCommand(item, job);
}
show(0);
