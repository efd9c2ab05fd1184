// Before anything is drawn: the theme and language chosen earlier, so that nothing flashes. Modules would come later.
(() => {
  const root = document.documentElement;
  try {
    const theme = localStorage.getItem("rwkv.theme");
    if (theme === "dark" || theme === "light") root.dataset.theme = theme;
    const language = localStorage.getItem("rwkv.language") || navigator.language || "en";
    root.lang = language.toLowerCase().startsWith("zh") ? "zh-CN" : "en";
  } catch {
    root.lang = "en"; // storage is forbidden; the page works without
  }
})();
