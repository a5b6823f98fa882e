(function () {
  "use strict";

  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const HEIGHT = 230;
  let plots = [];

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function number(value) {
    return value === null || value === undefined ? "-" : String(Number(value.toPrecision(4)));
  }

  function options(chart, width) {
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
    return {
      width: width,
      height: HEIGHT,
      scales: { x: { time: false } },
      cursor: { y: false },
      axes: [
        Object.assign({}, axis, { space: 60 }),
        Object.assign({}, axis, { size: 64, values: (plot, ticks) => ticks.map(number) }),
      ],
      series: [{ label: "step" }].concat(
        chart.series.map((one, at) => ({
          label: one.label,
          stroke: colour("--s" + (1 + (at % 8))),
          width: one.points ? 0 : 1.75,
          points: one.points
            ? { show: true, size: 7, fill: colour("--s" + (1 + (at % 8))) }
            : { size: 4, fill: colour("--paper") },
          spanGaps: true,
          value: (plot, value) => number(value),
        }))
      ),
    };
  }

  function draw() {
    plots.forEach((plot) => plot.destroy());
    plots = charts.map((chart) => {
      const frame = document.getElementById(chart.id);
      const plot = new uPlot(options(chart, frame.clientWidth), [chart.steps].concat(chart.series.map((one) => one.values)), frame);
      const canvas = plot.root.querySelector("canvas");
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", frame.dataset.summary);
      plot.root.querySelector(".u-legend").setAttribute("aria-label", chart.title + ": values under the pointer");
      return plot;
    });
  }

  draw();
  const resized = new ResizeObserver(() => {
    plots.forEach((plot, at) => {
      const width = document.getElementById(charts[at].id).clientWidth;
      if (width > 0 && width !== plot.width) plot.setSize({ width: width, height: HEIGHT });
    });
  });
  charts.forEach((chart) => resized.observe(document.getElementById(chart.id)));
  // The canvases are painted in the theme's colours, so another theme, or paper, paints them anew.
  ["(prefers-color-scheme: dark)", "print"].forEach((query) => matchMedia(query).addEventListener("change", draw));

  // What is folded away on the screen is part of the page on paper.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));

  const check = document.getElementById("filter-check");
  if (check === null) return;
  const version = document.getElementById("filter-version");
  const count = document.getElementById("filter-count");
  const prompts = Array.from(document.querySelectorAll("article.prompt"));

  function filter() {
    let shown = 0;
    prompts.forEach((prompt) => {
      const kept =
        check.value === "" ||
        JSON.parse(prompt.dataset.fails).some(
          ([model, name]) =>
            (version.value === "" || model === version.value) && (check.value === "*" || name === check.value)
        );
      prompt.hidden = !kept;
      shown += kept ? 1 : 0;
    });
    count.textContent = shown + " of " + prompts.length + " prompts";
    version.disabled = check.value === "";
  }
  check.addEventListener("change", filter);
  version.addEventListener("change", filter);
  filter();
})();
