"use strict";
// One player at a time.
document.addEventListener("play", (event) => {
  for (const audio of document.querySelectorAll("audio")) {
    if (audio !== event.target) audio.pause();
  }
}, true);

// Headings of a sortable table become buttons; aria-sort tells which one the rows follow.
const collator = new Intl.Collator(undefined, { numeric: true });

function compareValues(a, b) {
  // What has no value comes last, in either direction.
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b);
}

function orderBy(items, valueOf, direction) {
  const keyed = items.map((item) => ({ item, value: valueOf(item) }));
  keyed.sort((a, b) => {
    const missing = a.value === null || b.value === null;
    return compareValues(a.value, b.value) * (missing ? 1 : direction);
  });
  return keyed.map(({ item }) => item);
}

function makeSortable(headings, sort) {
  headings.forEach((heading, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      // Names rise first, numbers fall: the best is what one looks for.
      const first = index === 0 || heading.dataset.kind === "text" ? "ascending" : "descending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = heading.getAttribute("aria-sort") === first ? other : first;
      for (const each of headings) each.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", order);
      sort(index, order === "ascending" ? 1 : -1);
    });
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const valueOf = (row, index) => {
    const cell = row.cells[index];
    if (cell.dataset.value === undefined) return cell.textContent.trim();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  makeSortable([...table.tHead.rows[0].cells], (index, direction) => {
    body.append(...orderBy([...body.rows], (row) => valueOf(row, index), direction));
  });
}
