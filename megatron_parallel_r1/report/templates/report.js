// Starts the page; axis.js, charts.js and traces.js stand before it.
document.documentElement.classList.add("js");
startCharts();
startTraces();
