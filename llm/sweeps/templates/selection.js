// The jobs, and which of them stand out in all charts and tables

const { jobs, keys, groups } = data;
const few = jobs.length <= 5 * data.few;
const ranked = [...jobs.keys()].sort((a, b) => rankOf(jobs[a]) - rankOf(jobs[b]) || a - b);
const lossOrder = ranked.filter(number => jobs[number].loss !== null).sort((a, b) => jobs[a].loss - jobs[b].loss);
lossOrder.forEach((number, place) => { jobs[number].lossShare = share(place, lossOrder.length); });
let chosen = [], pinned = false, pointed = null;  // jobs that stand out, and the step that is read
const marks = { jobs: [], groups: [], cells: [] };  // rows of the tables and buttons of the heatmap, by number
const HINT = "Point at a job to read it, click to keep it. On a chart, the arrow keys go from job to job and along it.";

function rankOf(job) {
  return job.loss === null ? Infinity : job.loss + (job.final ? 0 : 1e6);
}

// Let jobs stand out, and read them near a step.
function show(numbers, step, aloud = false) {
  if (String(numbers) == String(chosen) && step === pointed) return;
  chosen = numbers;
  pointed = step;
  charts.forEach(chart => chart.mark());
  const parts = described();
  document.querySelectorAll(".readout").forEach(readout => {
    readout.replaceChildren();
    add(readout, "b", parts ? parts[0] : "");
    readout.append(parts ? parts[1] : HINT);
  });
  if (aloud) byId("status").textContent = parts ? parts.join("") : "";
  for (const row of document.querySelectorAll("tr.chosen")) row.classList.remove("chosen");
  for (const pressed of document.querySelectorAll("[aria-pressed=true]")) pressed.setAttribute("aria-pressed", false);
  const shownGroups = new Set(numbers.map(number => jobs[number].group));
  numbers.forEach(number => marks.jobs[number].classList.add("chosen"));
  shownGroups.forEach(group => marks.groups[group]?.classList.add("chosen"));
  if (shownGroups.size == 1) marks.cells[[...shownGroups][0]]?.setAttribute("aria-pressed", true);
}

function described() {
  if (!chosen.length) return null;
  const job = jobs[chosen[0]], loss = value => value === null || value === undefined ? "–" : value.toFixed(3);
  if (chosen.length > 1)
    return [groups[job.group].title, " · " + chosen.length + " jobs: losses " +
      chosen.map(each => loss(jobs[each].loss)).join(", ")];
  const told = job.loss === null ? "" : (job.final ? ", final loss " : ", last evaluated ") + loss(job.loss);
  if (pointed === null) return [nameOf(job), " · " + job.state + told];
  const read = (curve, row) => curve[row][nearestPlace(curve[0], pointed)];
  const curve = job.training[0].length ? job.training : job.validation;
  return [nameOf(job), " · " + job.state + told + " · near step " + pointed + " (" +
    shortNumber(read(curve, 1)) + " tokens, " + shortNumber(read(curve, 2)) + " s): validation " +
    loss(read(job.validation, 3)) + ", training " + loss(read(job.training, 3)) + ", smoothed " +
    loss(read(job.training, 4))];
}

function nameOf(job) {
  return "job " + job.name + ": " + job.title;
}

// The button of some jobs was pressed: they stand out until it is pressed again.
function press(numbers) {
  pinned = !(pinned && String(numbers) == String(chosen));
  show(pinned ? numbers : [], null, true);
}

document.addEventListener("keydown", event => {
  if (event.key == "Escape") pinned = false, show([], null);
});
