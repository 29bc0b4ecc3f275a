"""The stylesheet of the report: one for light and dark, system fonts, colours that the colour-blind tell apart."""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #fff; --ink: #1d2127; --soft: #646b76; --rule: #e3e4e0;
  --good: #1a7f4b; --goodback: #e9f6ee; --bad: #b4341f; --badback: #fdeeea;
  --k0: #2f6fb3; --k1: #c8741a; --k2: #1f8a63; --k3: #b8405e; --k4: #7a5bb5; --k5: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1c1f25; --ink: #e7e8ea; --soft: #9aa2ae;
  --rule: #31353d; --good: #5fce95; --goodback: #16291f; --bad: #ff8a73; --badback: #33191a;
  --k0: #73b0f0; --k1: #f0a95a; --k2: #5fce9f; --k3: #f283a0; --k4: #b79df0; --k5: #a3abb8; } }
.c0 { --c: var(--k0) } .c1 { --c: var(--k1) } .c2 { --c: var(--k2) }
.c3 { --c: var(--k3) } .c4 { --c: var(--k4) } .c5 { --c: var(--k5) }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1160px; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.9rem; margin: 0; letter-spacing: -.02em }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem } h3 { font-size: 1rem; margin: 1.4rem 0 .5rem }
h4 { font-size: .75rem; margin: 0 0 .3rem; color: var(--soft); font-weight: 600; letter-spacing: .03em }
small { color: var(--soft); font-weight: 400; font-size: .8rem } h2 small, h3 small { margin-left: .8rem }
.legend span { color: var(--c); font-weight: 600; white-space: nowrap }
p.legend { margin: .3rem 0 0; color: var(--soft) }
.state { color: var(--bad) }
.verdicts { display: grid; gap: .8rem; margin-top: 1.4rem;
  grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)) }
.verdict { display: flex; gap: .9rem; padding: .9rem 1.1rem; border-radius: 10px; border: 1px solid var(--v);
  background: var(--vb) }
.verdict.ok { --v: var(--good); --vb: var(--goodback) } .verdict.alarm { --v: var(--bad); --vb: var(--badback) }
.verdict i { flex: none; width: 1.6rem; height: 1.6rem; border-radius: 50%; background: var(--v); color: var(--card);
  font: 700 1rem/1.6rem system-ui, sans-serif; text-align: center }
.verdict p { margin: .1rem 0 0 } .verdict b { color: var(--v) }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  flex: 0 1 auto }
.tables { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start } .tables .wide { flex: 1 1 100% }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
caption { text-align: left; padding: .7rem 1rem 0; font-weight: 600 }
th, td { text-align: left; padding: .5rem 1rem; border-top: 1px solid var(--rule); white-space: nowrap }
td { max-width: 40rem; overflow-wrap: anywhere }
thead th { border-top: 0; color: var(--ink) } thead th:empty { padding: 0 }
tbody th { font-weight: 400; color: var(--soft) }
.ci { color: var(--soft); font-size: .87em }
.interval { display: inline-block; margin-left: .6rem; vertical-align: middle; stroke: var(--k0); fill: var(--k0);
  stroke-width: 2 }
.interval .rail { stroke: var(--rule); stroke-width: 1 }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)) }
figure { margin: 0; padding: .8rem .9rem .5rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px;
  display: flex; flex-direction: column; justify-content: space-between }
figcaption { display: grid; grid-template-columns: auto 1fr; column-gap: .8rem; align-items: baseline;
  margin-bottom: .4rem }
figcaption .legend { display: flex; flex-wrap: wrap; justify-content: flex-end; gap: 0 .8rem; font-size: .82rem }
figcaption b { white-space: nowrap } figcaption small { grid-column: 1 / -1 }
figure svg { width: 100%; height: auto; overflow: visible }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums }
svg .grid { stroke: var(--rule); stroke-width: 1 } svg .guide { stroke: var(--soft); stroke-dasharray: 4 4 }
svg polyline { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
svg .raw { stroke-width: 1; opacity: .35 } svg .band { fill: var(--c); opacity: .16 }
svg circle { fill: var(--c) } svg .hidden { opacity: 0; stroke: transparent; stroke-width: 8 }
svg .hidden:hover { opacity: 1 }
.interval circle { fill: var(--k0); stroke: none }
article { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: .8rem 1rem;
  margin-bottom: .7rem }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .87rem/1.5 ui-monospace, monospace;
  max-height: 18rem;
  overflow-y: auto }
pre.prompt { color: var(--soft); margin-bottom: .6rem }
.columns { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)) }
.columns > div { border-left: 3px solid var(--rule); padding-left: .8rem }
.chip { display: inline-block; margin: .4rem .4rem 0 0; padding: 0 .55rem; border-radius: 1rem; font-size: .8rem;
  background: var(--paper); border: 1px solid var(--rule); color: var(--soft) } .chip b { color: var(--ink) }
details { margin-top: 1.4rem } summary { cursor: pointer; font-weight: 600; margin-bottom: .8rem }
details > pre { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1rem;
  max-height: none }
"""
