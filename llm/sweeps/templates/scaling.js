// The law of a ladder of sizes and budgets, and larger runs

function addRows(parent, label, names, rows) {
  addTable(parent, label, names.map((name, place) => ({
    name,
    cells: rows.map((row, number) => [number, row[place]]),  // they have an order of their own
    text: !place,
  })));
}

function addScaling() {
  const { scaling } = data;
  byId("scaling").hidden = false;
  byId("lawful").hidden = Boolean(scaling.why);
  byId("law").textContent = scaling.why ? "There is no law: " + scaling.why + "." :
    scaling.law + ". It is off by " + scaling.residual + " (root mean square over settings); fitted to all but the " +
    "largest quarter of them, it is off by " + scaling.held_out + " there.";
  if (scaling.why) return;
  addRows(byId("constants"), "constants of the law", ["constant", "value", "from", "to"], scaling.constants);
  byId("has-optima").hidden = !scaling.optima.length;
  addRows(byId("optima"), "best sizes", ["compute", "operations", "parameters", "tokens"],
    scaling.optima);
  byId("predictions").hidden = !scaling.predictions.length;
  addRows(byId("predictions"), "larger runs", ["compute", "size", "parameters", "tokens", "predicted",
    "came out", "off by", "in half intervals"], scaling.predictions);
  for (const command of scaling.commands) add(byId("predictions"), "code", command);
  addChart(byId("scaling-chart"), 360, drawScaling).redraw();
}

function drawScaling(context, axes, width, height) {
  const { points, curves, beyond, unit } = data.scaling, tera = 1e12;
  const all = [...points, ...curves.flat(), ...beyond.flatMap(([compute, ...losses]) =>
    losses.filter(loss => loss !== null).map(loss => [compute, loss]))];
  const span = place => [Math.min(...all.map(each => each[place])), Math.max(...all.map(each => each[place]))];
  const [[least, most], [low, high]] = [span(0), span(1)];
  const { px: place, py } = frame(axes, width, height,
    widened({ low: least / tera, high: most / tera, log: true, title: "10¹² floating-point operations" }, 0.04),
    widened({ low, high, title: unit }, 0.06));
  const px = compute => place(compute / tera);
  function dot(x, y, radius, colour) {
    context.fillStyle = colour;
    context.beginPath();
    context.arc(px(x), py(y), radius, 0, 7);
    context.fill();
  }
  curves.forEach((curve, number) => {
    context.strokeStyle = colours.kinds[number % colours.kinds.length];
    context.lineWidth = 1.6;
    context.beginPath();
    curve.forEach(([x, y]) => context.lineTo(px(x), py(y)));
    context.stroke();
  });
  points.forEach(([x, y]) => dot(x, y, 3.5, ink));
  for (const [x, value, from, to, outcome] of beyond) {
    context.strokeStyle = ink;
    context.beginPath();
    context.moveTo(px(x), py(from));
    context.lineTo(px(x), py(to));
    context.stroke();
    context.fillStyle = ink;
    context.font = "14px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText("◆", px(x), py(value));
    if (outcome === null) continue;
    context.fillStyle = colours.kinds[1];
    context.font = "20px system-ui, sans-serif";
    context.fillText("★", px(x), py(outcome));
  }
  return { mark() {}, nearest: () => null };
}
