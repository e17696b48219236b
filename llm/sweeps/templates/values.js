// The final loss over each swept key

function axisOfKey(key) {
  return key.numeric
    ? { low: key.values[0], high: key.values.at(-1), log: key.log, title: key.name, ticks: key.values }
    : { texts: key.values, title: key.name };
}

function lossTitle(which) {
  return which + (data.texts[textShown].per_token ? "loss (" + measure().unit + ")" : measure().title);
}

function axisOfLoss(numbers, title) {
  const losses = numbers.length ? numbers.map(number => jobs[number].loss) : [1, 2];  // none to draw
  const low = Math.min(...losses), high = Math.max(...losses);
  return { low, high, log: low > 0 && high > 4 * low, title };
}

// What seeds alone change: a standard deviation to either side of the lowest mean.
function drawNoise(context, left, right, py) {
  const { noise } = data.texts[textShown];
  const lowest = figuresOf(measure().name, jobsOfGroup[groups.findIndex(group => group.text == textShown)]);
  if (!noise || !lowest.length) return;
  const [top, bottom] = [mean(lowest) + noise, mean(lowest) - noise].map(py);
  context.globalAlpha = 0.25;
  context.fillStyle = faint;
  context.fillRect(left, top, right - left, bottom - top);
  context.globalAlpha = 1;
}

function addValues(keyNumber) {
  const key = keys[keyNumber];
  const figure = add(byId("values"), "figure");
  const caption = add(figure, "figcaption");
  add(caption, "b", key.name);
  const told = add(caption, "span");
  const host = addHost(figure, "Final loss over " + key.name + ". Up and down: another job, by rank. Escape: none.");
  addChart(host, 280, (context, axes, width, height) => {
    const means = key.means[textShown];  // [value, final figure]
    const lowest = means.length && means.reduce((a, b) => b[1] < a[1] ? b : a);
    told.textContent = lowest ? " lowest mean " + lowest[1].toFixed(3) + " at " + cut(tickText(key, lowest[0])) : "";
    const there = lossOrder.filter(number => isSelected(number) && jobs[number].values[keyNumber] !== null);
    const all = lossOrder.filter(number => jobs[number].values[keyNumber] !== null);
    const { left, right, px, py } = frame(axes, width, height,
      widened(axisOfKey(key), 0.06), widened(axisOfLoss(all, lossTitle("final ")), 0.06));
    const at = number => [px(jobs[number].values[keyNumber]), py(jobs[number].loss)];
    function dot(context, number, radius, alpha) {
      context.globalAlpha = alpha;
      context.fillStyle = jobs[number].colour;
      context.beginPath();
      context.arc(...at(number), radius, 0, 7);
      context.fill();
      context.globalAlpha = 1;
    }
    drawNoise(context, left, right, py);
    [...there].reverse().forEach(number => dot(context, number, few ? 4 : 2.5, few ? 0.9 : 0.5));
    context.strokeStyle = ink;
    context.lineWidth = 1.6;
    context.beginPath();
    means.forEach(([value, loss]) => {
      if (!key.numeric) context.moveTo(px(value) - 9, py(loss));  // between names there is nothing to join
      context.lineTo(px(value) + (key.numeric ? 0 : 9), py(loss));
    });
    context.stroke();
    if (lowest) {
      context.beginPath();
      context.arc(px(lowest[0]), py(lowest[1]), 8, 0, 7);
      context.stroke();
    }
    return {
      mark: (context, numbers) =>
        numbers.filter(number => all.includes(number)).forEach(number => dot(context, number, 6, 1)),
      nearest(x, y) {
        let best = 30, found = null;
        for (const number of there) {
          const [a, b] = at(number), away = Math.hypot(a - x, b - y);
          if (away < best) [best, found] = [away, { jobs: [number], step: null }];
        }
        return found;
      },
    };
  });
}
