"use strict";
// A click on a column's name sorts the cases by it; another click turns the order round.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = button.closest("table").tBodies[0];
    const falling = head.getAttribute("aria-sort") === "ascending";
    const key = (row) => row.cells[Number(head.dataset.column)].dataset.value;
    const compare = (a, b) => (a === "" ? 1 : b === "" ? -1
      : (falling ? -1 : 1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, {numeric: true}) : a - b));
    const rows = [...body.rows].sort((one, other) => compare(key(one), key(other)));
    for (const other of button.closest("table").querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    body.append(...rows);
  });
}
// A slider leafs through the planes of its view; so do the arrow keys on it.
for (const slider of document.querySelectorAll("input[type=range]")) {
  const planes = [...slider.parentElement.querySelectorAll("svg")];
  slider.addEventListener("input", () => {
    planes.forEach((plane, number) => plane.toggleAttribute("hidden", number !== Number(slider.value)));
    const [name, , at, of, count] = planes[slider.value].getAttribute("aria-label").split(" ");
    slider.nextElementSibling.textContent = [name, at, of, count].join(" ");
  });
}
// A link to a picture unfolds what it lies in.
const unfold = () => {
  const target = document.getElementById(location.hash.slice(1));
  const folded = target && target.closest("details:not([open])");
  if (folded) {
    folded.open = true;
    target.scrollIntoView();
  }
};
addEventListener("hashchange", unfold);
unfold();
