// Before the first paint, so that a chosen theme does not flash.
try {
  const theme = localStorage.getItem("fst.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // Storage may be forbidden; the system's theme is used.
}
