// Charts, by pointer and by keyboard. Each has canvases one over the other: for the axes, for what is drawn once, and
// for what stands out, so that pointing redraws little.

const charts = [];

function addChart(host, height, draw) {
  const [axes, base, over] = Array.from({ length: 3 }, () => add(host, "canvas"));
  const chart = { busy: false };  // with a drag, which is not to point at jobs
  host.style.height = height + "px";
  chart.redraw = () => {
    const width = host.clientWidth, sharp = Math.min(devicePixelRatio, 2);
    for (const canvas of [axes, base, over]) {
      canvas.width = width * sharp;
      canvas.height = height * sharp;
      canvas.style.width = width + "px";
      canvas.style.height = height + "px";
      canvas.getContext("2d").scale(sharp, sharp);
    }
    chart.drawn = draw(base.getContext("2d"), axes.getContext("2d"), width, height);
    chart.mark();
  };
  chart.mark = () => {
    const context = over.getContext("2d");
    context.clearRect(0, 0, host.clientWidth, height);
    base.style.opacity = chosen.length ? 0.3 : 1;
    chart.drawn.mark(context, chosen);
  };
  host.addEventListener("pointermove", event => {
    if (pinned || chart.busy) return;
    const found = chart.drawn.nearest(...inside(host, event));
    show(found?.jobs ?? [], found?.step ?? null);
  });
  host.addEventListener("pointerleave", () => pinned || show([], null));
  host.addEventListener("click", event => {
    if (chart.busy) return;
    const found = chart.drawn.nearest(...inside(host, event));
    pinned = Boolean(found) && !(pinned && String(found.jobs) == String(chosen) && found.step == pointed);
    show(pinned ? found.jobs : [], pinned ? found.step : null);
  });
  host.addEventListener("keydown", byKeyboard);
  charts.push(chart);
  return chart;
}

function addHost(parent, label) {  // the element that a chart fills
  return add(parent, "div", "", { class: "chart", tabindex: 0, role: "application", "aria-label": label });
}

function redraw() {
  charts.forEach(chart => chart.redraw());
}

function inside(host, event) {
  const box = host.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

function byKeyboard(event) {
  const turn = { ArrowDown: 1, ArrowUp: -1 }[event.key], along = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const order = ranked.filter(isSelected);
  if (event.key == "Escape") pinned = false, show([], null);
  else if (turn && order.length) {
    const at = chosen.length ? order.indexOf(chosen[0]) : turn > 0 ? -1 : 0;
    pinned = true;
    show([order.at((at + turn) % order.length)], pointed, true);
  } else if (along && chosen.length) {
    const job = jobs[chosen[0]];
    const steps = (job.validation[0].length ? job.validation : job.training)[0];
    const at = pointed === null ? (along > 0 ? -1 : steps.length) : nearestPlace(steps, pointed);
    show(chosen, steps[Math.max(0, Math.min(steps.length - 1, at + along))] ?? null, true);
  } else return;
  event.preventDefault();
}

function nearestPlace(values, value) {  // in rising values
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = low + high >> 1;
    if (values[middle] < value) low = middle; else high = middle;
  }
  return Math.abs(values[low] - value) < Math.abs(values[high] - value) ? low : Math.max(high, 0);
}
