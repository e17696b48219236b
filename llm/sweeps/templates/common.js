// What all pages share: their data, and elements that show it. Data reaches a page as text, never as HTML.

const data = JSON.parse(byId("data").textContent);
const LONG = 40, LONG_LABEL = 20;  // characters of a value and of a heatmap's; the whole shows under the pointer
const TALL = 25;  // rows of a table; more scroll

function byId(id) {
  return document.getElementById(id);
}

function add(parent, name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  parent.append(made);
  return made;
}

function cut(text, most = LONG) {
  return text.length > most ? text.slice(0, most) + "…" : text;
}

function addCut(parent, name, text, attributes, most = LONG) {
  return add(parent, name, cut(text, most), text.length > most ? { ...attributes, title: text } : attributes);
}

// A table that is sorted by its heads; its columns are { name, cells: [[what it is sorted by, what it shows], …],
// text }. With `press`, the first cell of a row is a button, which is told the row's number. Returns the rows.
function addTable(parent, label, columns, press) {
  const box = add(parent, "div", "", { class: "wide", tabindex: 0, role: "region", "aria-label": label });
  const table = add(box, "table", "", { class: "sortable" });
  const head = add(add(table, "thead"), "tr"), body = add(table, "tbody");
  const aligned = column => column.text ? { class: "text" } : {};
  columns.forEach((column, place) =>
    add(add(head, "th", "", { scope: "col", ...aligned(column) }), "button", column.name)
      .addEventListener("click", () => sortBy(place)));
  const rows = columns[0].cells.map((_, number) => {
    const row = add(body, "tr");
    for (const column of columns) {
      const shown = column.cells[number][1];
      if (press && column == columns[0])
        add(add(row, "td"), "button", shown).addEventListener("click", () => press(number));
      else if (shown instanceof Node) add(row, "td", "", aligned(column)).append(shown);
      else addCut(row, "td", shown, aligned(column));
    }
    return row;
  });
  const order = [...rows.keys()];
  function sortBy(place) {
    const chosen = head.cells[place], down = chosen.getAttribute("aria-sort") == "ascending";
    for (const each of head.cells) each.removeAttribute("aria-sort");
    chosen.setAttribute("aria-sort", down ? "descending" : "ascending");
    const values = columns[place].cells.map(cell => cell[0]);
    order.sort((a, b) => (values[a] === null) - (values[b] === null) ||  // what is missing comes last either way
      (down ? -1 : 1) * compared(values[a], values[b]));
    body.append(...order.map(number => rows[number]));
  }
  head.cells[0].setAttribute("aria-sort", "ascending");
  box.classList.toggle("tall", rows.length > TALL);
  return rows;
}

// The columns of what is set in each row.
function settingColumns(settings) {
  const keys = [...new Set(settings.flatMap(Object.keys))].sort((a, b) => (a == "seed") - (b == "seed"));
  return keys.map(key => ({
    name: data.names[key],
    cells: settings.map(setting => key in setting ? [setting[key], setting[key]] : [null, "–"]),
    text: settings.some(setting => key in setting && isNaN(setting[key])),
  }));
}

function compared(a, b) {  // numbers, also those in texts, before other texts
  const [x, y] = [Number(a), Number(b)];
  return isNaN(x) - isNaN(y) || x - y || String(a).localeCompare(b);
}

// A heatmap of settings over two keys: `grid` has the number of the setting at each place, `cells` for each setting
// [its shade, from 0 to 1, its text]. A cell is a button, which tells `press` its number. Returns these by number.
function addHeatmap(parent, grid, cells, titles, press) {
  const table = add(add(parent, "div", "", { class: "wide" }), "table", "", { class: "heat" });
  if (grid.caption) add(table, "caption", grid.caption);
  const head = add(add(table, "thead"), "tr"), body = add(table, "tbody");
  const corner = add(head, "th");
  if (grid.down) corner.append(grid.down + " ↓", document.createElement("br"));
  if (grid.along) corner.append(grid.along + " →");
  for (const column of grid.columns) addCut(head, "th", column, { scope: "col" }, LONG_LABEL);
  const buttons = [];
  grid.cells.forEach((numbers, down) => {
    const row = add(body, "tr");
    addCut(row, "th", grid.rows[down], { scope: "row" }, LONG_LABEL);
    for (const number of numbers) {
      const place = add(row, "td");
      if (number === null) continue;
      const [shade, text] = cells[number];
      const button = add(place, "button", text, { title: titles[number], "aria-pressed": false });
      if (shade === null) button.className = "missing";
      button.style.setProperty("--heat", Math.round(100 * shade) + "%");
      button.addEventListener("click", () => press(number));
      buttons[number] = button;
    }
  });
  return buttons;
}

function addFacts(list, pairs) {
  for (const [name, text] of pairs) {
    add(list, "dt", name);
    add(list, "dd", text);
  }
}

function addCommand(parent, { again, about }) {
  if (again) add(parent, "code", again);
  if (about || !again)
    add(parent, "small", about || "its record holds more than a command to paste may: see .hydra/overrides.yaml");
}

function addSample(parent, { prompt, text }) {
  const shown = add(parent, "pre");
  add(shown, "span", prompt);
  shown.append(text);
}
