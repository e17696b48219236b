// Parallel coordinates: a line is a job; dragging along an axis keeps those that pass there

const brushes = new Map();  // by axis: the part of it that jobs must pass
let parallelAxes = [];
const allAgain = byId("all");

function parallelPlace(axisNumber, job) {
  const key = keys[axisNumber], value = key ? job.values[axisNumber] : job.loss;
  if (value === null) return null;
  // Jobs at one value lie a little apart, by their loss, so that many are seen as many.
  const apart = key && !few && job.loss !== null ? 0.02 * (job.lossShare - 0.5) : 0;
  return parallelAxes[axisNumber].at(value) + apart;
}

function drawParallel(context, _, width, height) {
  parallelAxes = [...keys.map(axisOfKey), axisOfLoss(lossOrder, measure().column)].map(axis => scaled(widened(axis, 0.02)));
  const side = 48, top = 34, bottom = height - 12;
  const gap = (width - 2 * side) / (parallelAxes.length - 1);
  const across = number => side + number * gap;
  const down = at => bottom - at * (bottom - top);
  const places = jobs.map(job => parallelAxes.map((_, number) => parallelPlace(number, job)));
  const visible = ranked.filter(isSelected).reverse();
  function trace(context, number, thick) {
    const kept = isSelected(number);
    context.globalAlpha = thick ? 1 : kept ? (few ? 0.9 : 0.45) : 0.06;
    context.lineWidth = thick ? 3 : few ? 1.6 : 0.8;
    context.strokeStyle = jobs[number].colour;
    context.setLineDash(jobs[number].loss === null ? [4, 4] : []);
    context.beginPath();
    places[number].forEach((at, axis) => at === null || context.lineTo(across(axis), down(at)));
    context.stroke();
    context.setLineDash([]);
    context.globalAlpha = 1;
  }
  function drawAxes(context) {
    context.font = SMALL;
    parallelAxes.forEach((axis, number) => {
      context.strokeStyle = faint;
      context.lineWidth = 1;
      context.beginPath();
      context.moveTo(across(number), top);
      context.lineTo(across(number), bottom);
      context.stroke();
      if (brushes.has(number)) {
        const [from, to] = brushes.get(number);
        context.fillStyle = ink;
        context.globalAlpha = 0.25;
        context.fillRect(across(number) - 7, down(to), 14, down(from) - down(to));
        context.globalAlpha = 1;
      }
      context.textAlign = "center";
      context.textBaseline = "top";
      context.fillStyle = ink;
      context.fillText(shortened(context, axis.title, Math.min(gap - 10, 2 * side - 4)), across(number), 6);
      context.textAlign = "left";
      context.textBaseline = "middle";
      let free = bottom + 20;  // down to where the line of texts is taken
      for (const tick of ticksOf(axis, Math.floor((bottom - top) / 35))) {
        const y = down(axis.at(tick));
        if (y > free) continue;
        free = y - 16;
        const last = number == parallelAxes.length - 1;
        const text = shortened(context, tickText(axis, tick), last ? side - 8 : gap / 2);
        context.fillStyle = paper;
        context.fillRect(across(number) + 3, y - 8, context.measureText(text).width + 6, 16);
        context.fillStyle = faint;
        context.fillText(text, across(number) + 6, y);
      }
    });
  }
  const last = across(parallelAxes.length - 1);
  drawNoise(context, last - 7, last + 7, value => down(parallelAxes.at(-1).at(value)));
  [...ranked].reverse().forEach(number => trace(context, number, false));
  return {
    across, down,
    axisAt: x => parallelAxes.findIndex((_, number) => Math.abs(across(number) - x) < 12),
    shareAt: y => (bottom - y) / (bottom - top),
    mark(context, numbers) {
      numbers.forEach(number => trace(context, number, true));
      drawAxes(context);  // over the lines, which would run through its texts
    },
    nearest(x, y) {
      const before = Math.max(0, Math.min(parallelAxes.length - 2, Math.floor((x - side) / gap)));
      const part = (x - across(before)) / gap;
      let best = 20, found = null;
      for (const number of visible) {
        const [from, to] = places[number].slice(before, before + 2);
        if (from === null || to === null) continue;
        const away = Math.abs(down(from + part * (to - from)) - y);
        if (away <= best) [best, found] = [away, { jobs: [number], step: null }];
      }
      return found;
    },
  };
}

const isSelected = number =>
  jobs[number].text == textShown && [...brushes].every(([axis, [from, to]]) => {
    const at = parallelPlace(axis, jobs[number]);
    return at !== null && at >= from && at <= to;
  });

function addParallel() {
  const figure = add(byId("values"), "figure", "", { class: keys.length > 1 ? "row" : "" });
  const caption = add(figure, "figcaption");
  add(caption, "b", "All together");
  caption.append(" a line is a job, dashed where it has no final figure; drag along an axis to keep the jobs that pass there, " +
    "in all charts, and click it to release them");
  const host = addHost(add(figure, "div", "", { class: "wide" }),
    "Parallel coordinates. Up and down: another job, by rank. Escape: none.");
  host.id = "parallel";
  host.style.minWidth = 120 * keys.length + 100 + "px";
  const chart = addChart(host, 340, drawParallel);
  let drag = null;
  host.addEventListener("pointerdown", event => {
    const [x, y] = inside(host, event), axis = chart.drawn.axisAt(x);
    if (axis >= 0 && event.pointerType == "mouse") {
      drag = { axis, from: chart.drawn.shareAt(y) };
      host.setPointerCapture(event.pointerId);
    }
    chart.busy = Boolean(drag);
  });
  host.addEventListener("pointermove", event => {
    if (!drag) return;
    const to = chart.drawn.shareAt(inside(host, event)[1]);
    brushes.set(drag.axis, [Math.min(drag.from, to), Math.max(drag.from, to)]);
    chart.redraw();
  });
  host.addEventListener("pointerup", event => {
    if (!drag) return;
    const moved = Math.abs(chart.drawn.shareAt(inside(host, event)[1]) - drag.from) > 0.01;
    if (!moved) brushes.delete(drag.axis);
    drag = null;
    select();
    setTimeout(() => { chart.busy = false; });  // after the click that this ends in
  });
}

function select() {  // the jobs that pass all brushes
  pinned = false;
  show([], null);
  allAgain.hidden = !brushes.size;
  allAgain.textContent = ranked.filter(isSelected).length + " of " + ranked.length + " jobs are shown; show all";
  redraw();
}

allAgain.addEventListener("click", () => {
  brushes.clear();
  select();
});
