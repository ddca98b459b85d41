// Curves with their values, drawn by uPlot when the claim that holds them is opened.
(() => {
  "use strict";
  const held = new Map([...document.querySelectorAll("script[data-chart]")].map((s) => [s.dataset.chart, s]));
  const drawn = [];
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const spell = (value) => (value == null ? "–" : Number(value.toPrecision(4)).toString());
  const told = (u, value, series, index) => {
    if (index == null) return "–";
    const { low, high } = u.bounds[series] ?? {};
    const around = low?.[index] != null && high?.[index] != null && low[index] < high[index]
      ? ` (${spell(low[index])} to ${spell(high[index])})` : "";
    return spell(value) + around;
  };
  const make = (box) => {
    const data = JSON.parse(held.get(box.dataset.chart).textContent);
    const plot = box.querySelector(".plot");
    const status = box.querySelector("[role=status]");
    box.hidden = false;
    const text = () => colour("--text");
    const axis = (label) => ({ label, stroke: text, grid: { stroke: () => colour("--grid"), width: 1 },
                               ticks: { stroke: () => colour("--grid"), width: 1 } });
    const log = { distr: 3, log: 10 };
    const columns = [data.x];
    const series = [{ label: data.xLabel, value: (u, value) => spell(value) }];
    const bounds = {};
    for (const line of data.series) {
      const index = columns.push(line.values) - 1;
      bounds[index] = line;
      series.push({ label: line.name, stroke: () => line.colour || text(), width: 2, spanGaps: true,
                    dash: line.dash ? [5, 4] : undefined, value: told, points: { show: false } });
    }
    const options = {
      width: plot.clientWidth, height: Math.min(380, Math.max(260, plot.clientWidth * 0.5)), series,
      scales: { x: { time: false, range: () => [data.x[0], data.x.at(-1)], ...(data.xLog ? log : {}) }, y: data.yLog ? log : {} },
      axes: [axis(data.xLabel), axis(data.yLabel)],
      legend: { live: true }, cursor: { points: { size: 7 } },
    };
    const u = new uPlot(options, columns, plot);
    u.bounds = bounds;
    drawn.push(u);
    new ResizeObserver(() => {
      if (plot.clientWidth && plot.clientWidth !== u.width) u.setSize({ width: plot.clientWidth, height: u.height });
    }).observe(plot);
    let at = null;
    const steps = { ArrowRight: 1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity };
    plot.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      const last = data.x.length - 1;
      at = Math.min(last, Math.max(0, (at ?? (steps[event.key] > 0 ? -1 : 1)) + steps[event.key]));
      u.setCursor({ left: u.valToPos(data.x[at], "x"), top: u.over.clientHeight / 2 });
      const values = data.series.flatMap((line) => line.values[at] == null ? [] : `${line.name} ${spell(line.values[at])}`);
      status.textContent = `${data.xLabel} ${spell(data.x[at])}: ${values.join(", ")}`;
    });
  };
  const waiting = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      waiting.unobserve(entry.target);
      make(entry.target);
    }
  }, { rootMargin: "400px" });
  const begin = (box) => {
    if (box.dataset.begun || !held.has(box.dataset.chart)) return;
    box.dataset.begun = "yes";
    box.hidden = false;
    waiting.observe(box);
  };
  for (const details of document.querySelectorAll("details:has(.chart)")) {
    const boxes = [...details.querySelectorAll(".chart")];
    const check = () => { if (details.open) boxes.forEach(begin); };
    details.addEventListener("toggle", check);
    check();
  }
  document.addEventListener("theme", () => { for (const u of drawn) u.redraw(false, true); });
})();
