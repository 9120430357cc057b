const all = (what, inside = document) => [...inside.querySelectorAll(what)];
document.body.classList.add("js");
for (const button of all("button[data-g]")) {
  const mine = all(`.plot [data-g="${button.dataset.g}"]`);
  button.onclick = () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", on);
    mine.forEach((each) => each.classList.toggle("off", !on));
  };
  button.onpointerenter = (event) => {
    if (event.pointerType !== "mouse") return;
    all(".plot").forEach((plot) => plot.classList.add("dim"));
    mine.forEach((each) => each.classList.add("lit"));
  };
  button.onpointerleave = () => {
    all(".plot").forEach((plot) => plot.classList.remove("dim"));
    mine.forEach((each) => each.classList.remove("lit"));
  };
}
for (const plot of all(".plot")) {
  const mark = plot.querySelector(".mark");
  const text = plot.parentElement.querySelector("output");
  plot.onpointermove = plot.onpointerdown = (event) => {
    const box = plot.getBoundingClientRect();
    const scale = plot.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = null;
    for (const line of all("polyline:not(.off)", plot)) {
      [...line.points].forEach((point, i) => {
        const far = Math.hypot(2 * (point.x - x), point.y - y);
        if (!best || far < best.far) best = { far, point, line, i };
      });
    }
    if (!best) return;
    const [step, value] = best.line.dataset.p.split(" ")[best.i].split(":");
    text.textContent = `${best.line.dataset.n}, step ${step}: ${value}`;
    mark.setAttribute("cx", best.point.x);
    mark.setAttribute("cy", best.point.y);
    mark.style.display = "inline";
  };
  plot.onpointerleave = () => { mark.style.display = "none"; text.textContent = ""; };
}
const value = (row, i) => {
  const text = row.cells[i].textContent.trim();
  return row.cells[i].className === "n" ? (parseFloat(text) || -Infinity) : text;
};
for (const table of all("table")) {
  const heads = all("thead th", table);
  heads.forEach((head, i) => {
    head.dataset.k = i;
    head.onclick = () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = all("tbody tr", table);
      rows.sort((a, b) => {
        const [p, q] = [value(a, i), value(b, i)];
        return (p < q ? 1 : p > q ? -1 : 0) * (down ? 1 : -1);
      });
      table.tBodies[0].append(...rows);
    };
  });
}
