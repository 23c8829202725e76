// The map without a script has tooltips; with one it has a panel, and is walked through with the arrow keys.
const map = document.getElementById("map");
const said = document.getElementById("said");
const marks = [...map.querySelectorAll("[data-cluster]")];
const REACH = 14;

for (const mark of marks) {
  const title = mark.querySelector("title");
  mark.text = title.textContent;
  mark.setAttribute("aria-label", mark.text);
  title.remove();
  if (!mark.hasAttribute("tabindex")) mark.setAttribute("tabindex", "-1");
}

function show(mark) {
  for (const other of marks) {
    other.classList.toggle("dim", other.dataset.cluster !== mark.dataset.cluster);
    other.classList.toggle("on", other === mark);
  }
  said.textContent = mark.text;
}

function nearest(event) {
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse());
  let best = null, least = REACH;
  for (const mark of marks) {
    const distance = Math.hypot(mark.dataset.x - point.x, mark.dataset.y - point.y);
    if (distance < least) { best = mark; least = distance; }
  }
  return best;
}

function point(event) {
  const mark = nearest(event);
  if (mark) show(mark);
}

function focus(event) {
  const mark = event.target.closest("[data-cluster]");
  if (mark) show(mark);
}

function step(event) {
  const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const here = event.target.closest("[data-cluster]");
  if (!by || !here) return;
  event.preventDefault();
  const own = marks.filter((mark) => mark.dataset.cluster === here.dataset.cluster);
  own[(own.indexOf(here) + by + own.length) % own.length].focus();
}

map.addEventListener("pointermove", point);
map.addEventListener("pointerdown", point);
// On the parent: an SVG that listens for focus becomes a stop of the Tab key itself.
map.parentNode.addEventListener("focusin", focus);
map.parentNode.addEventListener("keydown", step);
