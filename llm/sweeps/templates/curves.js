// The loss curves, over tokens, steps or time

const POSITIONS = ["step", "tokens_seen", "seconds"];  // the first rows of every curve
const SERIES = {  // by the name of its checkbox: where it stands, from the faintest to the strongest
  raw: { curve: "training", row: 3 },
  smooth: { curve: "training", row: 4 },
  validation: { curve: "validation", row: 3 },
};
const view = { x: "tokens_seen", log: false, whole: false, validation: true, smooth: few, raw: few };  // its controls

function unitOfTime(most) {
  return most > 7200 ? ["h", 3600] : most > 180 ? ["min", 60] : ["s", 1];
}

function quantile(sorted, part) {
  return sorted[Math.round(part * (sorted.length - 1))];
}

function drawCurves(context, axes, width, height) {
  const column = POSITIONS.indexOf(view.x);
  const shown = Object.keys(SERIES).filter(name => view[name]);
  const visible = ranked.filter(isSelected).reverse();  // the best is drawn last
  let low = Infinity, high = -Infinity, most = 0;
  const early = [];
  for (const number of visible)
    for (const name of shown) {
      const curve = jobs[number][SERIES[name].curve], values = curve[SERIES[name].row];
      for (const value of values) {
        if (value === null || view.log && value <= 0) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
      const places = curve[column], tenth = 0.1 * (places.at(-1) ?? 0);
      const begin = values.find((value, place) => value !== null && places[place] >= tenth);
      if (begin !== undefined) early.push(begin);
      most = Math.max(most, curve[column].at(-1) ?? 0);
    }
  // The fall at the beginning, and a job that diverges, would press flat what there is to compare: the curves
  // from where the usual job is after a tenth of its way on.
  const usual = 1.1 * quantile(early.sort((a, b) => a - b), 0.5);
  const clipped = high > 1.2 * usual;
  byId("whole").hidden = !clipped;
  if (clipped && !view.whole) high = usual;
  if (low > high) [low, high] = [1, 2];  // nothing to draw
  const [unit, scale] = view.x == "seconds" ? unitOfTime(most) : ["", 1];
  const titles = { step: "steps (updates)", tokens_seen: "tokens seen", seconds: "training time (" + unit + ")" };
  const { left, right, top, bottom, px, py } = frame(axes, width, height,
    { low: 0, high: most / scale || 1, title: titles[view.x] },
    widened({ low, high, log: view.log, title: lossTitle("") }, 0.02));
  function trace(context, name, job, thick) {
    const curve = job[SERIES[name].curve], xs = curve[column], ys = curve[SERIES[name].row];
    const many = few ? 1 : jobs.length < 200 ? 0.7 : 0.4;
    context.globalAlpha = name == "raw" ? (thick ? 0.45 : 0.16) : thick || few ? 1 : 0.75;
    context.lineWidth = thick ? { raw: 1, smooth: 1.6, validation: 2.6 }[name]
      : { raw: 1, smooth: 1.1, validation: 2 }[name] * many;
    context.setLineDash(name == "smooth" && (few || thick) ? [5, 3] : []);
    context.strokeStyle = job.colour;
    context.beginPath();
    let begun = false;
    for (let i = 0; i < ys.length; i++) {
      if (ys[i] === null || xs[i] === null || view.log && ys[i] <= 0) {
        begun = false;
        continue;
      }
      const x = px(xs[i] / scale), y = py(ys[i]);
      if (begun) context.lineTo(x, y); else context.moveTo(x, y);
      begun = true;
    }
    context.stroke();
    context.setLineDash([]);
    if (name != "validation" || ys.length > 60 || !(few || thick)) return;
    context.fillStyle = job.colour;
    ys.forEach((value, i) => {
      if (value === null || view.log && value <= 0) return;
      context.beginPath();
      context.arc(px(xs[i] / scale), py(value), thick ? 3.2 : 2.2, 0, 7);
      context.fill();
    });
  }
  function clippedTo(context, work) {
    context.save();
    context.beginPath();
    context.rect(left, top, right - left + 4, bottom - top);
    context.clip();
    work();
    context.restore();
  }
  // Between the lowest and the highest evaluation of a setting's seeds, where all were evaluated at the same places.
  function fillBetweenSeeds(numbers) {
    const curves = numbers.filter(isSelected).map(number => jobs[number].validation).filter(curve => curve[0].length);
    if (curves.length < 2 || curves.some(curve => String(curve[0]) != String(curves[0][0]))) return;
    if (curves.some(curve => curve[3].some(value => value === null || view.log && value <= 0))) return;
    const places = [...curves[0][0].keys()];
    const across = place => px(curves.reduce((sum, curve) => sum + curve[column][place], 0) / curves.length / scale);
    const edge = pick => place => [across(place), py(pick(...curves.map(curve => curve[3][place])))];
    context.globalAlpha = 0.15;
    context.fillStyle = jobs[numbers[0]].colour;
    context.beginPath();
    for (const point of [...places.map(edge(Math.max)), ...places.reverse().map(edge(Math.min))]) context.lineTo(...point);
    context.fill();
    context.globalAlpha = 1;
  }
  clippedTo(context, () => {
    if (view.validation && few) jobsOfGroup.forEach(fillBetweenSeeds);
    for (const name of shown) for (const number of visible) trace(context, name, jobs[number], false);
  });
  return {
    mark(context, numbers) {
      clippedTo(context, () => {
        for (const name of shown) for (const number of numbers) trace(context, name, jobs[number], true);
        if (numbers.length != 1 || pointed === null) return;
        const curve = jobs[numbers[0]].training[0].length ? "training" : "validation";
        const curveRows = jobs[numbers[0]][curve];
        const x = px(curveRows[column][nearestPlace(curveRows[0], pointed)] / scale);
        context.globalAlpha = 1;
        context.lineWidth = 1;
        context.strokeStyle = ink;
        context.beginPath();
        context.moveTo(x, top);
        context.lineTo(x, bottom);
        context.stroke();
      });
    },
    nearest(x, y) {
      let best = 60, found = null;
      for (const number of visible)
        for (const name of shown) {
          if (name == "raw" && shown.length > 1) continue;
          const curve = jobs[number][SERIES[name].curve], xs = curve[column], ys = curve[SERIES[name].row];
          const value = (x - left) / (right - left) * most;
          const i = nearestPlace(xs, value);
          if (!xs.length || ys[i] === null) continue;
          const next = Math.max(0, Math.min(xs.length - 1, value > xs[i] ? i + 1 : i - 1));
          const part = xs[next] == xs[i] ? 0 : (value - xs[i]) / (xs[next] - xs[i]);
          const at = py(ys[i]) + (part > 0 && part < 1 && ys[next] !== null ? part * (py(ys[next]) - py(ys[i])) : 0);
          const away = Math.abs(at - y) + (next == i ? Math.abs(px(xs[i] / scale) - x) : 0);
          if (away < best) {
            best = away;
            found = { jobs: [number], step: curve[0][i] };
          }
        }
      return found;
    },
  };
}
