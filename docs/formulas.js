// What pymdownx.arithmatex marks as a formula is set by MathJax, also after a page changes without a reload.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex" },
};
if (typeof document$ !== "undefined") {
  document$.subscribe(() => window.MathJax.typesetPromise && window.MathJax.typesetPromise());
}
