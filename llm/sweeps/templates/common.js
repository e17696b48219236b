// Tables that are sorted by what stands in data-value; cells without it come last either way.
for (const table of document.querySelectorAll(".sortable")) {
  if (table.rows.length > 25) table.parentElement.classList.add("tall");
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") == "ascending";
    heads.forEach(each => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sorted = [...table.tBodies[0].rows].map(row => [row.cells[column].dataset.value, row]);
    sorted.sort(([a], [b]) => (a === "") - (b === "") || (down ? -1 : 1) * (a - b || a.localeCompare(b)));
    table.tBodies[0].append(...sorted.map(([, row]) => row));
  }));
}
