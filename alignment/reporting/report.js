"use strict";
(() => {
  const tip = document.getElementById("tip");

  function show(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const room = document.documentElement.clientWidth;
    const left = x + 14 + width > room ? x - 14 - width : x + 14;
    tip.style.left = `${Math.max(4, Math.min(left, room - width - 4))}px`;
    tip.style.top = `${y - height - 12 < 4 ? y + 16 : y - height - 12}px`;
  }
  const hide = () => { tip.hidden = true; };

  // Anything with data-tip: pointer or keyboard.
  for (const hot of document.querySelectorAll("[data-tip]")) {
    hot.addEventListener("pointermove", (event) => show(hot.dataset.tip, event.clientX, event.clientY));
    hot.addEventListener("pointerleave", hide);
    hot.addEventListener("focus", () => {
      const box = hot.getBoundingClientRect();
      if (hot.matches(":focus-visible")) show(hot.dataset.tip, box.right, box.top + box.height / 2);
    });
    hot.addEventListener("blur", hide);
  }

  // Curves: the nearest step under the pointer, a dot on every line.
  for (const svg of document.querySelectorAll("svg[data-hover]")) {
    const rows = JSON.parse(svg.dataset.hover).rows;
    const cross = svg.querySelector(".cross");
    const line = cross.querySelector("line");
    const dots = cross.querySelectorAll("circle");
    svg.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
      const [x, text, heights] = rows.reduce((best, row) => (Math.abs(row[0] - at) < Math.abs(best[0] - at) ? row : best));
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      heights.forEach((y, i) => {
        dots[i].style.display = y === null ? "none" : "";
        if (y !== null) { dots[i].setAttribute("cx", x); dots[i].setAttribute("cy", y); }
      });
      cross.classList.add("on");
      show(text, event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", () => { cross.classList.remove("on"); hide(); });
  }

  // Lineage: pointing lights up what a stage was made from, choosing shows its settings.
  const graph = document.querySelector("svg.lineage");
  if (!graph) return;
  const nodes = [...graph.querySelectorAll("[data-node]")];
  const links = [...graph.querySelectorAll("[data-from]")];
  const details = [...document.querySelectorAll(".node-detail")];

  function light(node) {
    const kin = new Set(node ? [node.dataset.node, ...node.dataset.ancestors.split(" ")] : []);
    graph.classList.toggle("lit", Boolean(node));
    nodes.forEach((other) => other.classList.toggle("on", kin.has(other.dataset.node)));
    links.forEach((link) => link.classList.toggle("on", kin.has(link.dataset.from) && kin.has(link.dataset.to)));
  }
  function choose(node) {
    nodes.forEach((other) => other.classList.toggle("chosen", other === node));
    details.forEach((detail) => detail.classList.toggle("shown", detail.id === `node-${node.dataset.node}`));
  }
  for (const node of nodes) {
    node.addEventListener("pointerenter", () => light(node));
    node.addEventListener("pointerleave", () => light(null));
    node.addEventListener("click", () => choose(node));
    node.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(node); }
    });
  }
  const shown = details.findIndex((detail) => detail.classList.contains("shown"));
  choose(nodes[shown < 0 ? nodes.length - 1 : shown]);
})();
