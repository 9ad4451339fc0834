// Contrasts of all visible texts with what is behind them, after WCAG 2.2, section 1.4.3: [[ratio, where], …].
() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const bytes = (...colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const luminance = ([red, green, blue]) => [red, green, blue].map((one) => {
    const part = one / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  }).reduce((sum, one, index) => sum + one * [0.2126, 0.7152, 0.0722][index], 0);
  const contrast = (behind, colour) => {
    const [one, other] = [luminance(bytes(...behind)), luminance(bytes(...behind, colour))];
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *:not(.layer, .layer *, option, noscript *)")) {
    const own = [...element.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
    const isArea = element.matches("textarea, input:not([type=range])");
    if (!(own || isArea) || !element.checkVisibility({ checkVisibilityCSS: true }) || element.disabled) continue;
    const behind = [];
    for (let one = element; one; one = one.parentElement) behind.unshift(getComputedStyle(one).backgroundColor);
    found.push([contrast(behind, getComputedStyle(element).color), element.outerHTML.slice(0, 80)]);
  }
  const area = getComputedStyle(document.querySelector(".area")).color;
  for (const token of document.querySelectorAll(".token")) {
    const tint = getComputedStyle(token).backgroundColor;
    if (tint !== "rgba(0, 0, 0, 0)") found.push([contrast([tint], area), token.className]);
  }
  return found;
}
