// Axes of charts: ticks, scales, texts that fit

function shortNumber(value) {
  const size = Math.abs(value);
  for (const [scale, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= scale) return +(value / scale).toPrecision(4) + unit;
  const plain = String(+value.toPrecision(4)), scientific = (+value.toPrecision(4)).toExponential();
  return size && size < 0.001 && scientific.length < plain.length ? scientific : plain;
}

function linearTicks(low, high, most) {
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(digit => digit * power).find(each => each >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, place) => (first + place) * step);
}

function logTicks(low, high, most) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const decades = Array.from({ length: last - first + 1 }, (_, place) => 10 ** (first + place));
  const inside = ticks => ticks.filter(tick => tick >= low * 0.999 && tick <= high * 1.001);
  for (const digits of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = inside(decades.flatMap(decade => digits.map(digit => digit * decade)));
    if (ticks.length <= most && ticks.length > 1) return ticks;
  }
  const powers = inside(decades);
  if (powers.length <= 1) return linearTicks(low, high, most);
  return powers.filter((_, place) => place % Math.ceil(powers.length / most) == 0);
}

// An axis is { low, high, log, title } or { texts, title }; `at` gives where a value lies, 0 to 1.
function scaled(axis) {
  if (axis.texts) {
    axis.at = value => (axis.texts.indexOf(value) + 0.5) / axis.texts.length;
    return axis;
  }
  if (axis.low == axis.high) {
    const room = Math.abs(axis.low) * 0.1 || 1;
    axis.low -= room;
    axis.high += room;
  }
  const [low, high] = axis.log ? [Math.log(axis.low), Math.log(axis.high)] : [axis.low, axis.high];
  axis.at = value => ((axis.log ? Math.log(value) : value) - low) / (high - low);
  return axis;
}

function widened(axis, by) {  // room beside the outermost points
  if (axis.texts) return axis;
  const room = axis.log ? (axis.high / axis.low) ** by : (axis.high - axis.low) * by;
  return axis.log ? { ...axis, low: axis.low / room, high: axis.high * room }
    : { ...axis, low: axis.low - room, high: axis.high + room };
}

function ticksOf(axis, most) {
  if (axis.ticks && axis.ticks.length <= most) return axis.ticks;
  if (axis.texts) {
    const every = Math.ceil(axis.texts.length / most);
    return axis.texts.filter((_, number) => number % every == 0);
  }
  return (axis.log ? logTicks : linearTicks)(axis.low, axis.high, Math.max(2, most));
}

const tickText = (axis, tick) => axis.texts || axis.numeric === false ? tick : shortNumber(tick);

function shortened(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let shown = text;
  while (shown && context.measureText(shown + "…").width > width) shown = shown.slice(0, -1);
  return shown + "…";
}
const SMALL = "12px system-ui, sans-serif";

// Grid, ticks and titles of a chart over x and y; gives where values lie in pixels.
function frame(context, width, height, x, y) {
  context.font = SMALL;
  scaled(x);
  scaled(y);
  const top = 24, bottom = height - 42, right = width - 14;
  const rows = ticksOf(y, Math.floor((bottom - top) / 45));
  const texts = rows.map(tick => shortened(context, tickText(y, tick), width / 4));
  const left = 12 + Math.max(20, ...texts.map(text => context.measureText(text).width));
  const px = value => left + x.at(value) * (right - left);
  const py = value => bottom - y.at(value) * (bottom - top);
  context.strokeStyle = line;
  context.fillStyle = faint;
  context.lineWidth = 1;
  context.textBaseline = "middle";
  context.textAlign = "right";
  rows.forEach((tick, number) => {
    context.beginPath();
    context.moveTo(left, py(tick));
    context.lineTo(right, py(tick));
    context.stroke();
    context.fillText(texts[number], left - 7, py(tick));
  });
  context.textBaseline = "top";
  context.textAlign = "center";
  const room = x.texts ? (right - left) / x.texts.length - 8 : 80;
  let free = 0;  // up to where the line of texts is taken
  for (const tick of ticksOf(x, Math.floor((right - left) / 75))) {
    const text = shortened(context, tickText(x, tick), Math.max(room, 60));
    const half = context.measureText(text).width / 2;
    const centre = Math.min(px(tick), width - half - 1);
    context.beginPath();
    context.moveTo(px(tick), bottom);
    context.lineTo(px(tick), bottom + 4);
    context.stroke();
    if (centre - half < free) continue;
    context.fillText(text, centre, bottom + 8);
    free = centre + half + 8;
  }
  context.textAlign = "right";
  context.fillText(x.title, right, height - 15);
  context.textAlign = "left";
  context.fillText(y.title, 0, 2);
  return { left, right, top, bottom, px, py };
}
