"use strict";
// Without this script the page is the same, but for the order of tables and the fields that filter them.
{
  const order = new Intl.Collator("en", { numeric: true });

  const valueOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value ?? cell.textContent;
  };

  /** Sorts a table by a column; rows that are equal stay in their order, empty cells come last. */
  const sort = (table, column, direction) => {
    const body = table.tBodies[0];
    const number = table.tHead.rows[0].cells[column].classList.contains("number");
    const keyed = Array.from(body.rows, (row) => [valueOf(row, column), row]);
    const compare = number ? (a, b) => a - b : order.compare;
    keyed.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return direction === "ascending" ? compare(a, b) : compare(b, a);
    });
    body.append(...keyed.map(([, row]) => row));
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const first = head.classList.contains("number") ? "descending" : "ascending";
        const turned = { ascending: "descending", descending: "ascending" }[head.getAttribute("aria-sort")];
        const direction = turned ?? first;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", direction);
        sort(table, column, direction);
      });
    });
  }

  for (const filter of document.querySelectorAll(".filter")) {
    const rows = Array.from(document.getElementById(filter.dataset.table).tBodies[0].rows);
    const texts = rows.map((row) => Array.from(row.cells, (cell) => cell.textContent).join("\n").toLowerCase());
    const [input, output] = [filter.querySelector("input"), filter.querySelector("output")];
    const all = rows.length.toLocaleString("en");
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, index) => {
        row.hidden = !words.every((word) => texts[index].includes(word));
        shown += row.hidden ? 0 : 1;
      });
      const count = shown.toLocaleString("en");
      output.textContent = words.length ? `${count} of ${all} ${filter.dataset.rows}` : `${all} ${filter.dataset.rows}`;
    });
    filter.hidden = false;
  }
}
