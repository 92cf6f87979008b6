// Sorting: numbers from the highest, then from the lowest, then as they were; words the other way round. Rows stay in
// their block, so that teachers stay on top and copied numbers below; what has no value comes last.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  const original = [...table.tBodies].map((body) => [...body.rows]);
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const orders = column ? ["descending", "ascending"] : ["ascending", "descending"];
      const next = orders[orders.indexOf(header.getAttribute("aria-sort")) + 1];
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      if (next) header.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      [...table.tBodies].forEach((body, block) => {
        const rows = original[block].filter((row) => !row.classList.contains("heading"));
        if (next) rows.sort((a, b) => compare(a.cells[column], b.cells[column], sign));
        const headings = original[block].filter((row) => row.classList.contains("heading"));
        body.append(...headings, ...rows);
      });
    });
  });
}

// Who follows a number to its cells sees all of them.
function unfold() {
  const target = document.getElementById(location.hash.slice(1));
  for (const details of target?.querySelectorAll("details") ?? []) details.open = true;
}
addEventListener("hashchange", unfold);
unfold();

function compare(a, b, sign) {
  const [x, y] = [a, b].map((cell) => cell.dataset.value);
  if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
  return sign * (a.tagName === "TH" ? x.localeCompare(y) : Number(x) - Number(y));
}
