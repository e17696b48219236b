// The jobs, and which of them stand out in all charts and tables

const { jobs, keys, groups } = data;
const few = jobs.length <= 5 * data.few;
// Only jobs of one text are drawn and ranked together: those of the text that is shown.
const finished = jobs.filter(job => job.loss !== null);
let textShown = 0, ranked, lossOrder;
const measure = () => data.texts[textShown].measure;
showText(0);

function showText(number) {
  textShown = number;
  ranked = [...jobs.keys()].filter(each => jobs[each].text == number)
    .sort((a, b) => compareJobs(jobs[a], jobs[b]) || a - b);
  lossOrder = ranked.filter(each => jobs[each].loss !== null);
  lossOrder.forEach((each, place) => { jobs[each].lossShare = share(place, lossOrder.length); });
}

let chosen = [], pinned = false, pointed = null;  // jobs that stand out, and the step that is read
const marks = { jobs: [], groups: [], cells: [] };  // rows of the tables and buttons of the heatmap, by number
const HINT = "Point at a job to read it, click to keep it. On a chart, the arrow keys go from job to job and along it.";

function compareJobs(one, other) {  // those without a final figure come last, by their last evaluations
  const value = job => job.loss ?? job.last ?? Infinity;
  return (one.loss === null) - (other.loss === null) || value(one) - value(other);
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
    return [groups[job.group].title, " · " + chosen.length + " jobs: final " + measure().title + " " +
      chosen.map(each => loss(jobs[each].loss)).join(", ")];
  const told = job.loss !== null ? ", final " + measure().title + " " + loss(job.loss)
    : job.last !== null ? ", last evaluated " + loss(job.last) : "";
  if (pointed === null) return [nameOf(job), " · " + job.state + told];
  const read = (curve, row) => curve[row][nearestPlace(curve[0], pointed)];
  const curve = job.training[0].length ? job.training : job.validation;
  return [nameOf(job), " · " + job.state + told + " · near step " + pointed + " (" +
    shortNumber(read(curve, 1)) + " tokens, " + shortNumber(read(curve, 2)) + " s): evaluated " +
    loss(read(job.validation, 3)) + ", training loss " + loss(read(job.training, 3)) + ", smoothed " +
    loss(read(job.training, 4))];
}

function nameOf(job) {
  return "job " + job.name + ": " + job.title;
}

// The button of some jobs was pressed: they stand out until it is pressed again.
function press(numbers) {
  if (jobs[numbers[0]].text != textShown) chooseText(jobs[numbers[0]].text);
  pinned = !(pinned && String(numbers) == String(chosen));
  show(pinned ? numbers : [], null, true);
}

document.addEventListener("keydown", event => {
  if (event.key == "Escape") pinned = false, show([], null);
});
