"""The style sheet of a page: light and dark, on a phone and on paper."""

PAGE_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2126; --soft: #59636e;
  --line: #d5dbe1; --card: #f5f7f9; --good: #1a7f37; --bad: #b42318; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181c; --ink: #e4e8ec; --soft: #a0aab4; --line: #38414a; --card: #1d2328;
    --good: #57c274; --bad: #ff8a7d; --link: #7db8f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 0 0 .5rem; font-weight: 600; }
p { max-width: 46rem; margin: .5rem 0; }
header p { color: var(--soft); }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; list-style: none; margin: 1rem 0 0;
  padding: 0; font-size: .9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem;
  list-style: none; margin: 1rem 0; padding: 0; }
.facts li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .8rem; }
.facts b { display: block; font-size: 1.5rem; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .85rem; }
.facts .good b { color: var(--good); }
.facts .bad b { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: .75rem;
  list-style: none; margin: .75rem 0; padding: 0; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .5rem; }
.tiles li.good { border-color: var(--good); }
.tiles li.bad { border-color: var(--bad); }
.tiles .good .mark { color: var(--good); }
.tiles .bad .mark { color: var(--bad); }
figure { margin: 0; }
figure img, .empty { display: block; width: 112px; height: 112px; object-fit: contain;
  margin: 0 auto .4rem; }
figure img { background: #ffffff; border-radius: .25rem; }
.empty { border: 1px dashed var(--line); border-radius: .25rem; }
figcaption { font-size: .8rem; line-height: 1.35; }
figcaption b { display: block; }
figcaption span:not(.mark) { display: block; color: var(--soft); }
.groups { display: flex; flex-wrap: wrap; gap: .75rem; margin: .75rem 0; align-items: stretch; }
.group { border: 1px solid var(--line); border-radius: .6rem; padding: .75rem; max-width: 100%; }
.group .tiles { display: flex; flex-wrap: wrap; margin: 0; }
.group .tiles li { width: 132px; }
.table { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
caption { text-align: left; color: var(--soft); padding-bottom: .35rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0;
  border-bottom: 1px solid var(--line); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.drawing { max-width: none; }
.drawing img { max-width: 100%; height: auto; background: #ffffff; border-radius: .5rem; }
@media print { nav { display: none; } .tiles li, .group { break-inside: avoid; } }
"""
