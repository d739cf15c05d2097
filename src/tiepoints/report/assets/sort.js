for (const table of document.querySelectorAll("table.sortable"))
  for (const head of table.querySelectorAll("th[data-c]")) {
    const button = document.createElement("button");
    button.type = "button"; button.title = "sort"; button.append(...head.childNodes); head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort"), first = head.dataset.b === "-1" ? "ascending" : "descending";
      const order = now ? (now === "ascending" ? "descending" : "ascending") : first;
      for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const key = row => { const cell = row.cells[head.dataset.c]; return parseFloat(cell.dataset.v ?? cell.textContent); };
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter(row => !row.classList.contains("head"));
        rows.sort((a, b) => {
          const x = key(a), y = key(b);
          if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
          return order === "ascending" ? x - y : y - x;
        });
        body.append(...rows);
      }
    });
  }
