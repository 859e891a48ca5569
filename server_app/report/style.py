"""The report's style sheet. A role has one colour: base grey, local only orange, federated blue, personalised purple.

The colours are told apart with the common kinds of colour blindness (after Okabe and Ito) and have the contrast of WCAG AA
as text in both schemes.
"""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #14181f; --muted: #5b6472; --line: #e2e6ec; --soft: #eef1f5;
  --federated: #0b62b8; --local: #b4530a; --own: #7a3fa8; --base: #6b7482; --band: #0b62b81c;
  --good: #0a7a52; --good-soft: #e0f4ec; --bad: #b3261e; --bad-soft: #fbe6e4; --warn: #8a5a00; --warn-soft: #fdf1d6;
  --s1: #0b62b8; --s2: #5fb3ea; --s3: #0f8f6d; --s4: #e0a100; --s5: #c0561b; --s6: #b0679b; --s7: #8b94a3; --s8: #3d4653;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1216; --card: #181c22; --ink: #e8ebf0; --muted: #9aa4b2; --line: #2a3038; --soft: #20252d;
    --federated: #6cb4f5; --local: #f0a05a; --own: #c79bf0; --base: #98a2b0; --band: #6cb4f524;
    --good: #5fd0a4; --good-soft: #12332a; --bad: #ff8f86; --bad-soft: #3d1d1b; --warn: #f0c160; --warn-soft: #3a2e12;
    --s1: #6cb4f5; --s2: #2f7fc4; --s3: #4fc7a1; --s4: #f0c660; --s5: #f0935a; --s6: #dba0c8; --s7: #7b8594; --s8: #c3cad4;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 36px 24px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 2px 0 8px; overflow-wrap: anywhere; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 0 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 14px; margin: 0 0 6px; overflow-wrap: anywhere; }
.apart { margin-top: 22px; }
p { margin: 0 0 10px; }
.over { text-transform: uppercase; letter-spacing: 0.08em; font-size: 12px; font-weight: 600; color: var(--muted); }
.muted { color: var(--muted); }
.small { font-size: 13px; }
.meta { display: flex; flex-wrap: wrap; gap: 6px 16px; align-items: center; color: var(--muted); font-size: 14px; }
.chip { padding: 2px 10px; border-radius: 99px; font-size: 13px; font-weight: 600; }
.chip.good { color: var(--good); background: var(--good-soft); }
.chip.bad { color: var(--bad); background: var(--bad-soft); }
.chip.warn { color: var(--warn); background: var(--warn-soft); }
.headline { font-size: 19px; line-height: 1.45; margin: 22px 0 20px; max-width: 62em; }
.notice {
  border-left: 4px solid var(--bad); background: var(--bad-soft); padding: 10px 14px; border-radius: 4px;
  overflow-wrap: anywhere;
}
.notice.warn { border-color: var(--warn); background: var(--warn-soft); }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
section { padding: 22px 24px; margin-top: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(142px, 1fr)); gap: 12px; }
.tile { padding: 12px 14px; }
.tile .kind { font-size: 13px; font-weight: 600; color: var(--muted); }
.tile .value {
  font-size: 21px; font-weight: 650; line-height: 1.35; letter-spacing: -0.015em; white-space: nowrap;
  font-variant-numeric: tabular-nums;
}
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 20px 28px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 16px 18px; margin-top: 10px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-size: 13px; font-weight: 600; color: var(--muted); vertical-align: bottom; }
tr:last-child td { border-bottom: 0; }
td.num, th.num { text-align: right; white-space: nowrap; }
td.name { overflow-wrap: anywhere; font-weight: 550; min-width: 8em; }
td.round { white-space: nowrap; }
td.why { overflow-wrap: anywhere; }
tr.total td { border-top: 2px solid var(--line); font-weight: 600; }
.win { font-weight: 700; }
.win::before { content: "\\2713\\00a0"; color: var(--good); }
.wins { background: var(--soft); border-radius: 6px; }
.change.good { color: var(--good); }
.change.bad { color: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 6px 0; font-size: 13px; color: var(--muted); }
.legend svg { width: 22px; height: 12px; vertical-align: -1px; margin-right: 6px; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: 4px; }
.chart { display: block; width: 100%; height: auto; }
.wide .chart { max-width: 680px; }
.strip { width: 150px; height: 22px; display: block; }
.chart text { font-size: 12.5px; fill: var(--muted); font-family: inherit; font-variant-numeric: tabular-nums; }
.panels .chart text { font-size: 11px; }
.chart .label { font-weight: 600; }
.chart .name { font-size: 12.5px; }
.grid line { stroke: var(--line); stroke-width: 1; }
.rule { stroke: var(--line); stroke-width: 2; }
.curve { fill: none; stroke-width: 2.6; stroke-linejoin: round; stroke-linecap: round; }
.panels .curve { stroke-width: 2; }
.curve.federated { stroke: var(--federated); }
.dot.federated, .fill.federated, text.federated { fill: var(--federated); }
.chart text.federated { fill: var(--federated); }
.chart text.local { fill: var(--local); }
.fill.local { fill: var(--local); }
.fill.own { fill: var(--own); }
.ring { fill: var(--card); stroke-width: 2; }
.ring.base { stroke: var(--base); }
.level { stroke-width: 1.8; }
.level.base { stroke: var(--base); stroke-dasharray: 1.5 4; stroke-linecap: round; }
.level.local { stroke: var(--local); stroke-dasharray: 7 4; }
.level.best { stroke: var(--good); stroke-dasharray: 3 3; }
.band { fill: var(--band); }
.s1 { fill: var(--s1); } .s2 { fill: var(--s2); } .s3 { fill: var(--s3); } .s4 { fill: var(--s4); }
.s5 { fill: var(--s5); } .s6 { fill: var(--s6); } .s7 { fill: var(--s7); } .s8 { fill: var(--s8); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 14px; }
.answer {
  background: var(--soft); border-radius: 10px; padding: 12px 16px; border-top: 3px solid var(--base);
  overflow-wrap: anywhere;
}
.answer.federated { border-color: var(--federated); }
blockquote { margin: 4px 0 14px; font-size: 17px; overflow-wrap: anywhere; }
.prewrap { white-space: pre-wrap; margin: 0; }
details { margin-top: 10px; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
footer { margin-top: 26px; color: var(--muted); font-size: 13px; }
@media (max-width: 560px) {
  main { padding: 22px 12px 36px; }
  section { padding: 16px 14px; }
  .headline { font-size: 17px; }
  .wide .chart text { font-size: 15px; }
  .panels { grid-template-columns: 1fr 1fr; }
  .panels .chart text { font-size: 16px; }
}
@media print {
  :root {
    --page: #fff; --card: #fff; --ink: #000; --muted: #444; --line: #ccc; --soft: #f3f3f3;
    --federated: #0b62b8; --local: #b4530a; --own: #7a3fa8; --base: #6b7482; --band: #0b62b81c;
    --s1: #0b62b8; --s2: #5fb3ea; --s3: #0f8f6d; --s4: #e0a100; --s5: #c0561b; --s6: #b0679b; --s7: #8b94a3; --s8: #3d4653;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 12px; }
  main { max-width: none; padding: 0; }
  section { padding: 12px 0; border: 0; border-top: 1px solid var(--line); border-radius: 0; }
  section, .tile, figure, tr, .answer { break-inside: avoid; }
  section.long { break-inside: auto; }
  h2, h3, h2 + p, .legend { break-after: avoid; }
  .pair { grid-template-columns: 1fr 1fr; }
  .tiles { grid-template-columns: repeat(6, 1fr); }
  .tile .value { font-size: 16px; }
  .scroll { overflow: visible; }
}
"""
