"""Do the tests notice? Plants one small fault after the other in a copy of src/fewer, and runs the tests that should fail.

python scripts/mutants.py                       # all of them: half an hour on two cores
python scripts/mutants.py --only layer.py crop  # those whose file or reason says so
python scripts/mutants.py --list                # which there are; an error if one can be planted no more

Each fault names the text it changes, which must stand in its file exactly once: where the code has moved on, the script
refuses until the fault is written anew. The score is the share that some test noticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CAUGHT, SURVIVED, UNDECIDED = "caught", "SURVIVED", "UNDECIDED"
FAILED = 1  # pytest's exit status where tests ran and some failed


class Fault(NamedTuple):
    """A text in a file below src/fewer, what stands there instead, why that is wrong, and who should say so."""

    file: str
    old: str
    new: str
    why: str
    tests: str


BLOCKS, LAYER, RUN = "runtime/sites/blocks.py", "runtime/kv/layer.py", "runtime/sites/cache_run.py"
DRAWN, ALONE = "tests/test_combinations.py", "tests/cache/test_layer.py"
PLAN, SELECT, MATCH = "tests/core/test_plan.py", "tests/core/test_select.py", "tests/core/test_match.py"
BUDGETS, ATTENTION = "tests/core/test_budgets.py", "tests/core/test_attention.py"
SILENCE = "tests/test_silence.py"
SWIFT, HEADS = "tests/generation/test_swift.py", "tests/generation/test_heads.py"
GUESSES = "tests/generation/test_guesses.py"
SESSION, CACHE, SITES = "tests/test_session.py", "tests/cache/test_cache.py", "tests/hosts/test_decoder_sites.py"

FAULTS = [
    # -- core ----------------------------------------------------------------------------------------------------------
    Fault("core/plan.py", "            y = y.masked_fill(~self.valid[..., None], 0)\n        return y\n",
          "        return y\n", "padding rows of a ragged plan hold something", PLAN),
    Fault("core/plan.py", "        return replace(self, anchor_weight=a / total,", "        return replace(self, anchor_weight=a,",
          "rows are no averages", PLAN),
    Fault("core/plan.py", "        at = prefix if protect else self.m\n", "        at = prefix\n",
          "a fused row stands among the others", PLAN),
    Fault("core/plan.py", "anchored.scatter(-1, torch.where(real, anchor, n), True)", "anchored.scatter(-1, anchor, True)",
          "anchors of padding rows are no sources", PLAN),
    Fault("core/plan.py", "        if self.back is not None:\n            row = row.masked_fill", "        if False:\n            row = row.masked_fill",
          "rows that are only looked at are given back", PLAN),
    Fault("core/tokens.py", "            guarded = guarded & plan.valid\n", "            pass\n",
          "padding is protected behind a ragged plan", f"{DRAWN} tests/test_padding.py"),
    Fault("core/tokens.py", "        return self.place() if ahead is None else self.place() - ahead\n", "        return self.place()\n",
          "padding in front counts as places", "tests/test_padding.py"),
    Fault("core/tokens.py", "            position=plan.gather(self.place()),\n            ahead=self._ahead(),\n        )\n\n    def _with_front",
          "            ahead=self._ahead(),\n        )\n\n    def _with_front", "tokens forget where they stood", PLAN),
    Fault("core/budgets.py", "    return round(x, 9)\n", "    return x\n", "float noise floors a whole number", BUDGETS),
    Fault("core/budgets.py", "        return max(min(count, free), min(1, free))\n", "        return min(count, free)\n",
          "a share of few tokens keeps none", BUDGETS),
    Fault("core/budgets.py", "        return free - min(asked, free)\n", "        return max(free - asked, 1)\n",
          "one always stays, whatever was asked", f"{BUDGETS} tests/test_bad_input.py tests/hosts/test_hosts.py"),
    Fault("core/budgets.py", "        return on_device(self.counts(free, at, least=least), real.device)[real]\n",
          "        return on_device([self.keep(free, at)], real.device).expand_as(real)\n",
          "shorter samples are granted what the longest is", DRAWN),
    Fault("core/select.py", "        return tokens.unchanged(scores.device)\n    return _first(", "        return tokens.unchanged(scores.device)\n    scores = -scores\n    return _first(",
          "the lowest scores stay", SELECT),
    Fault("core/select.py", "total, (2 * i + 1) / (2 * number))", "total, (2 * i + 1) / (2 * k))",
          "points are spread for the widest sample", "tests/test_padding.py tests/core/test_select.py"),
    Fault("core/match.py", "        if forbidden:\n            s[..., :forbidden] = float(\"-inf\")\n", "", "protected tokens receive others", f"{MATCH} tests/test_contract.py"),
    Fault("core/match.py", "    return _fold(metric, budget, tokens, at, parts, _half, order, penalty)\n",
          "    return _fold(metric.flip(-2), budget, tokens, at, parts, _half, order, penalty)\n", "similarities of other tokens", MATCH),
    Fault("core/attention.py", "            late = where[positions.start :]\n", "            late = where[positions.start :] + 1\n",
          "a query does not see itself", ATTENTION),
    Fault("core/attention.py", "    return (p * w).masked_fill_(w == 0, 0)\n", "    return p\n", "padding votes", f"{ATTENTION} tests/test_padding.py"),
    Fault("core/attention.py", "    return size.clamp_min(1e-30).log()", "    return size.clamp_min(1e-30)", "sizes are added, not their logarithm",
          "tests/methods/test_tome.py tests/core/test_attention.py tests/hosts/test_hosts.py"),
    Fault("core/ragged.py", "shown = torch.cat([mask[i, :, :n], mask[i, :, width:]], -1)", "shown = torch.cat([mask[i, :, -n:], mask[i, :, width:]], -1)",
          "a head reads the mask of other rows", "tests/cache"),
    Fault("core/rope.py", "torch.addcmul(a * cos, b, sin, value=-1)", "torch.addcmul(a * cos, b, sin)", "keys are turned wrongly",
          "tests/cache/test_exact.py tests/cache/test_cache.py"),
    Fault("core/cache/rows.py", "        return self.real & (self.real.cumsum(-1) <= width)\n", "        return self.real & (self.age >= self.n - width)\n",
          "padding counts among the first rows", f"{DRAWN} {CACHE}"),
    Fault("core/cache/selectors.py", "    if rows.real is None or kernel == 1:\n", "    if True:\n", "holes are neighbours", ALONE),
    Fault("core/cache/selectors.py", "    pools = [k * g for k in counts]\n", "    pools = [max(counts) * g for _ in counts]\n",
          "shorter samples share the budget of the longest", f"{DRAWN} {CACHE}"),
    Fault("core/visual/layout.py", "        keep = keep & tokens.valid\n    after", "    after", "padding of a prompt stays",
          f"{DRAWN} tests/hosts/test_vision_language.py"),
    # -- runtime: blocks -----------------------------------------------------------------------------------------------
    Fault(BLOCKS, "        self.proportional = self.proportional or reducer.proportional ", "        self.proportional = reducer.proportional ",
          "sizes are forgotten behind another method", f"{DRAWN}::test_methods_that_keep_all_there_is"),
    Fault("runtime/trace.py", "other.memory, other.shared = [dict(m) for m in self.memory], dict", "other.memory, other.shared = list(self.memory), dict",
          "a checkpoint's second run shares the first one's memory", SESSION),
    Fault(BLOCKS, '        if self.program.execution == "packed" and self.steps and', '        if self.program.execution == "packed" and',
          "rows are packed though padding stands in front", f"{DRAWN}::test_methods_that_keep_all_there_is"),
    Fault(BLOCKS, "take(x, self.live.anchor), beside.gathered(self.live, tokens.valid, watched=True)", "take(x, self.live.anchor), beside",
          "masked execution shows a method all rows beside those that are there", DRAWN),
    Fault(BLOCKS, "        if seen is not None and valid is not None:\n            seen.bias = hiding(seen.bias, valid)\n", "",
          "padding is looked at by the second method of a block", DRAWN),
    Fault(BLOCKS, "        if not self.steps and tokens.valid is not None and self.live is None:\n", "        if False:\n",
          "padding stays where the tokenizer put it", DRAWN),
    Fault(BLOCKS, "            while passes and passes[-1][0] != layer:\n                passes.pop()\n", "            passes[:-1] = []\n",
          "what an error left behind goes on", SILENCE),
    Fault(BLOCKS, "        if passes and passes[-1][0] == layer + 1 and passes[-1][1] is visit:\n", "        if False:\n",
          "a pass that ended in an error still waits", SILENCE),
    Fault(BLOCKS, "            run = passes.pop()[1]\n", "            run = passes[-1][1]\n", "an inner pass goes on in place of the outer one",
          f"{DRAWN} {SESSION}"),
    Fault(BLOCKS, "        other.trace, other._moved, other.counted = self.trace.fork(), {}, False\n", "        other.trace, other._moved, other.counted = self.trace, {}, False\n",
          "a block's second run is traced", f"{SESSION} {DRAWN}"),
    Fault(BLOCKS, "        if tokens is not self.tokens:  # blocks", "        if tokens is None:  # blocks", "rotary tables stay those of the first plan",
          f"{DRAWN} {SITES}"),
    Fault(BLOCKS, "        weight = real.to(x.dtype)[..., None]\n", "        weight = torch.ones_like(x[..., :1])\n", "padding counts in a mean-pooled answer",
          f"{SESSION} tests/hosts/test_hosts.py"),
    Fault(BLOCKS, "            size = _placed(torch.ones(x.shape[:2], device=x.device), slot, size)\n", "            size = None\n",
          "masked rows forget their sizes", f"{DRAWN} {SESSION}"),
    Fault("runtime/sites/visual.py", "            self.standing = replace(self.standing, exact=False, exact_totals=False)\n\n    def _all_stay", "            pass\n\n    def _all_stay",
          "visual rows that other methods drop are counted", f"{DRAWN}::test_samples_that_were_found"),
    Fault("runtime/sites/visual.py", "            if not getattr(reducer, \"changes\", False):", "            if False:", "a prompt that loses nothing is changed beside others", f"{DRAWN}::test_methods_that_keep_all_there_is"),
    Fault("runtime/sites/tower.py", "(kept.shape[1], full) if ran.tokens.valid is None else None", "(kept.shape[1], full)",
          "a share is claimed of towers that keep different numbers", f"{DRAWN}::test_samples_that_were_found"),
    Fault("runtime/trace.py", "                    valid = step.plan.policy > 0\n", "                    pass\n", "what a learned mask hides counts as kept", SESSION),
    Fault("runtime/trace.py", "        for step in reversed(self.steps):\n            features", "        for step in self.steps:\n            features",
          "rows are given back in the order they went", SESSION),
    Fault("runtime/costs.py", "            pairs = (pairs + entry.attention) / 2 if self.causal else pairs\n", "", "tokens see those behind them",
          "tests/hosts/test_decoder_sites.py tests/methods/test_counts_and_costs.py"),
    # -- runtime: the KV cache -----------------------------------------------------------------------------------------
    Fault(LAYER, "        self.local.clear()\n        self.memory = {\n", "        self.memory = {\n", "crop keeps a layer's memory of rows that are gone", ALONE),
    Fault(LAYER, "            m: {k: t[..., : self.length - gone, :] if isinstance(t, Tensor) else t for k, t in kept.items()}\n            for m, kept in self.memory.items()\n",
          "            m: dict(kept)\n            for m, kept in self.memory.items()\n", "crop keeps a method's memory of tokens that are gone", ALONE),
    Fault(LAYER, "        self.waiting = None if self.waiting is None else self.waiting.before(self.length)\n", "", "tokens come back that were cropped", ALONE),
    Fault(LAYER, "        self.totals = [max(t - gone, 0) for t in self.totals]\n", "", "cropped tokens count against a budget", ALONE),
    Fault(LAYER, "        self.shift = None if self.shift is None else self.shift.index_select(0, rows)\n", "", "beams leave compact positions in their old order", DRAWN),
    Fault(LAYER, '        for name in ("position", "rotated_by", "received"):\n', '        for name in ("position", "rotated_by"):\n', "beams leave received attention in its old order", ALONE),
    Fault(LAYER, "        self.waiting = None if self.waiting is None else self.waiting.of(rows)\n", "", "beams leave waiting tokens in their old order", ALONE),
    Fault(LAYER, "            if ragged or self.is_sliding:\n                gone", "            if ragged:\n                gone", "rows outside a window are seen", f"{SITES} {DRAWN} {CACHE}"),
    Fault(LAYER, "        self.codes = []  # rows are not where they were coded: they are coded anew\n", "", "codes outlive the rows they hold", ALONE),
    Fault(LAYER, "            order = self.positions().argsort(dim=-1)\n", "            order = self.positions().argsort(dim=-1, descending=True)\n", "shuffled rows are arranged backwards", ALONE),
    Fault(LAYER, "        place = self.positions()\n        heads = max(place.shape[1], plan.lead[1])\n", "        place = torch.arange(keys.shape[-2])[None, None]\n        heads = max(place.shape[1], plan.lead[1])\n",
          "rows are numbered anew at every eviction", CACHE),
    Fault("runtime/kv/state.py", "            rows.scatter_(2, where, rows[:, :, last:].clone())\n", "            rows.scatter_(2, where, rows[:, :, last - 1 : last].clone())\n", "another row than the newest takes a place", "tests/cache"),
    Fault(RUN, "            if s > layer.window - 1 or layer.reduced:", "            if False:", "rows outside a window count as real", f"{CACHE}::test_in_a_sliding_layer_a_budget_is_of_its_window"),
    Fault(RUN, "            totals = [min(t, layer.window - 1) for t in totals]\n", "", "budgets of a sliding layer count the whole text", f"{CACHE}::test_in_a_sliding_layer_a_budget_is_of_its_window"),
    Fault(RUN, "            gap = (rows.real.sum(-1) > plan.lengths)[..., None]\n", "            pass\n", "a text that lost nothing is turned", f"{DRAWN}::test_conversations_that_were_found"),
    Fault(RUN, "        new[..., : old.shape[-1]] += old\n", "", "attention received earlier is forgotten", f"{CACHE} tests/cache"),
    Fault("runtime/sites/revival.py", "valid & (rows > self.start - window)", "valid & (rows >= self.start - window)", "the revival window is one wider", "tests/methods/test_lazyllm.py"),
    Fault("runtime/sites/reread.py", "span = slice(max(first - method.overlap, 0), last)", "span = slice(first, last)", "the overlap of KVzip's chunks is ignored", "tests/cache/test_kvzip.py"),
    Fault("runtime/sites/kv_cache.py", "under.run, under.call = self._passes.pop() if self._passes else (None, None)", "under.run, under.call, _ = None, None, self._passes.pop()", "a nested pass ends the outer one", SILENCE),
    # -- hosts ---------------------------------------------------------------------------------------------------------
    Fault("hosts/attention.py", "            bias = summed(bias, _dropped(self.policy), v.dtype)\n", "            pass\n", "masked rows are attended to", f"{DRAWN} {SESSION}"),
    Fault("hosts/attention.py", "            mask = unsaid(module, q, k, kwargs)\n        scale", "            pass\n        scale", "a bias takes the causal flag away", "tests/hosts tests/test_contract.py"),
    Fault("hosts/attention.py", "                config._attn_implementation_internal = before\n", "                pass\n", "a config keeps our name", SESSION),
    Fault("hosts/base.py", "            run = under.run if self.kind == \"decoder\" else None  #", "            run = under.run  #", "a tower's attention is taken for the decoder's around it", DRAWN),
    Fault("hosts/base.py", "self.pools_from = found.prefix if found.pools_from is None else found.pools_from", "self.pools_from = found.prefix", "prefix tokens that a model pools are left out", "tests/hosts/test_hosts.py tests/test_contract.py"),
    Fault("hosts/decoder.py", "        last = at + 1 == len(slots) or slots[at + 1] != slots[at]\n", "        last = True\n", "methods act before a layer's last call", "tests/hosts/test_guests.py tests/cache/test_written_out_caches.py tests/hosts/test_written_out.py"),
    Fault("hosts/logical.py", "    bias = torch.zeros(place.shape, device=x.device).masked_fill(place < 0, LOW)[:, :, None] if holes else None\n", "    bias = None\n", "holes of a written-out attention are seen", "tests/cache/test_written_out_caches.py"),
    Fault("hosts/rotary.py", "float(getattr(module, scale, 1.0))", "1.0", "stretched rotations are not", "tests/cache tests/hosts"),
    # -- several tokens a pass -----------------------------------------------------------------------------------------
    Fault("generation/verifying.py", "position_ids=(past + depths)[None]", "position_ids=(past + torch.arange(len(depths)))[None]",
          "guesses stand at their rows, not at their depths", SWIFT),
    Fault("generation/verifying.py", "torch.cat([sees.new_ones(len(depths), past), sees], 1)",
          "torch.cat([sees.new_ones(len(depths), past), torch.ones_like(sees).tril()], 1)",
          "guesses side by side see each other", SWIFT),
    Fault("generation/verifying.py", "        if path != wanted:\n", "        if False:\n",
          "rows of a rejected guess stay in the cache", SWIFT),
    Fault("generation/verifying.py", "            self.cache.crop(len(path) - nodes)", "            pass",
          "the cache is not cut back", SWIFT),
    Fault("generation/verifying.py", "past + depths[:, None] - at < self.window", "past + depths[:, None] - at <= self.window",
          "a window is one row too wide", SWIFT),
    Fault("generation/writing.py", "scores = self.processor(self.ids, raw)", "scores = raw",
          "logits processors are not asked", SWIFT),
    Fault("generation/writing.py", "torch.multinomial(scores.softmax(-1), num_samples=1)",
          "torch.multinomial((1.4 * scores).softmax(-1), num_samples=1)",
          "a sampler is too sure", f"{SWIFT}::test_sampled_texts_are_as_likely_as_the_models"),
    Fault("generation/penalty.py", "input_ids[:, -self.window :]", "input_ids", "the penalty forgets nothing", SWIFT),
    Fault("generation/levels.py", "self.x = x[:, -1:] if path is None else x[:, path[-1:]]", "self.x = x[:, -1:]",
          "heads look at the last guess, not at the last that came true", GUESSES),
    Fault("generation/levels.py", "x, given = x[:, index], {k: _rows(v, index, rows) for k, v in given.items()}",
          "x, given = x[:, index], dict(given)", "blocks that are heads read tokens at others' positions", GUESSES),
    Fault("generation/teaching.py", "F.pad(labels[:, ahead:], (0, min(ahead, labels.shape[1])), value=IGNORED)",
          "labels.roll(-ahead, 1)", "the end of a text teaches its beginning", HEADS),
    Fault("generation/teaching.py", "None if g is None else g * asked.to(g.dtype) for g in made", "g for g in made",
          "heads' gradients are not scaled with the loss", HEADS),
    Fault("generation/heads.py", "            h = h + linear(inward(h))\n", "            h = x.to(h.dtype) + linear(inward(x.to(h.dtype)))\n",
          "heads do not build on each other", GUESSES),
    Fault("generation/tree.py", "(hits + self.TRUST * guess.chance) / (tests + self.TRUST)", "guess.chance",
          "what came true is forgotten", GUESSES),
    # -- learning, and models that talk --------------------------------------------------------------------------------
    Fault("training/influx.py", "torch.where(stays, example[:, 1], example[:, 0])", "torch.where(stays, example[:, 1], 0)",
          "examples that leave were not decided", "tests/text/test_influx.py"),
    Fault("training/influx.py", "shaped = torch.where(tokens <= limit, share.pow(weight), share.pow(-weight))",
          "shaped = share.pow(weight)", "ever longer prompts are rewarded", "tests/text/test_influx.py"),
    Fault("methods/text/influx.py", "leading(example, size, count)", "leading(-example, size, count)",
          "the least wanted examples stay", "tests/text/test_influx.py"),
    Fault("agents/debate.py", "known = [views[who], *self.seen[who]]", "known = [views[who]]",
          "what was read once is read again", "tests/agents/test_debate.py"),
    Fault("agents/debate.py", "heard = [self._heard(who, number, views)", "heard = [self._heard(who, 1, views)",
          "groups never hear each other", "tests/agents/test_debate.py"),
    Fault("agents/density.py", "if lost := sorted(before.entities - step.entities):", "if lost := sorted(frozenset()):",
          "a summary forgets what it named", "tests/agents/test_density.py"),
    Fault("evaluation/selection.py", "_at(plain.curve, one.curve[-1][1])", "_at(plain.curve, plain.curve[-1][1])",
          "equal tokens are equal steps", "tests/evaluation/test_selection.py"),
    Fault("recipes/loop.py", "step_scheduler_with_optimizer=False", "step_scheduler_with_optimizer=True",
          "two processes run through a schedule twice as fast", "tests/training/test_launched.py"),
    Fault("runtime/sites/loss.py", "    dist.all_reduce(counts)\n", "", "each process has a share of its own",
          "tests/training/test_launched.py"),
]  # fmt: skip


def stale(fault: Fault, source: Path = ROOT / "src/fewer") -> str | None:
    """Why a fault cannot be planted, or nothing."""
    path = source / fault.file
    found = path.read_text().count(fault.old) if path.exists() else 0
    return None if found == 1 else f"stale: {fault.file}, {found} times, not once: {fault.old!r} ({fault.why})"


def tested(copy: Path, tests: Sequence[str], limit: float) -> tuple[int, str]:
    """pytest's exit status on a copy of src, and the first test that failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "--hypothesis-profile=unshrunk"]
    environment = os.environ | {
        "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    ran = subprocess.run(
        [*command, "-o", f"pythonpath={copy} tests", *tests], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=limit, check=False,
    )  # fmt: skip
    if ran.returncode not in (0, FAILED):
        raise SystemExit(f"{' '.join(tests)}: the tests did not run\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    lines = (line.split(" - ")[0] for line in ran.stdout.splitlines() if line.startswith("FAILED "))
    return ran.returncode, next(lines, "").removeprefix("FAILED ").strip()


def attempt(fault: Fault, copy: Path, limit: float) -> tuple[str, str]:
    """CAUGHT, SURVIVED or UNDECIDED, and by which test.

    Caught is what a test fails on that passes without it. A pass that does not end in time says nothing: the machine may
    be slow."""
    path = copy / "fewer" / fault.file
    before = path.read_text()
    path.write_text(before.replace(fault.old, fault.new))
    try:
        status, by = tested(copy, fault.tests.split(), limit)
    except subprocess.TimeoutExpired:
        return UNDECIDED, f"no end within {limit:g} s"
    finally:
        path.write_text(before)
    if status != FAILED:
        return SURVIVED, ""
    try:
        status, _ = tested(copy, [by] if by else fault.tests.split(), limit)
    except subprocess.TimeoutExpired:
        return UNDECIDED, f"no end within {limit:g} s without it"
    if status == FAILED:
        raise SystemExit(f"{by} fails without any fault; mend it first")
    return CAUGHT, by


def run(faults: Sequence[Fault], jobs: int, limit: float) -> Iterator[tuple[Fault, str, str]]:
    """Each fault with what became of it, in order; `jobs` of them at once, each in a copy of its own."""
    with tempfile.TemporaryDirectory() as folder:
        copies: Queue[Path] = Queue()
        for number in range(jobs):
            copy = Path(folder, str(number))
            shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
            copies.put(copy)

        def one(fault: Fault) -> tuple[str, str]:
            copy = copies.get()
            try:
                return attempt(fault, copy, limit)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            for fault, (what, by) in zip(faults, pool.map(one, faults), strict=True):
                yield fault, what, by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="faults whose file or reason holds all of these words")
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at once")
    parser.add_argument("--limit", type=float, default=900, help="seconds for the tests of one fault")
    parser.add_argument(
        "--list", action="store_true", help="plant nothing; say which faults there are, and their tests"
    )
    args = parser.parse_args()
    faults = [f for f in FAULTS if all(word in f"{f.file} {f.why}" for word in args.only)]
    if args.list:
        for fault in faults:
            print(f"{fault.file}: {fault.why}  [{fault.tests}]")
    if lost := [why for fault in faults if (why := stale(fault))]:
        raise SystemExit("these faults fit the code no more; write them anew:\n" + "\n".join(lost))
    if args.list:
        return
    counted = dict.fromkeys((CAUGHT, SURVIVED, UNDECIDED), 0)
    for fault, what, by in run(faults, args.jobs, args.limit):
        counted[what] += 1
        print(f"{what:9}  {fault.file}: {fault.why}  {by}", flush=True)
    share = 100 * counted[CAUGHT] / max(len(faults), 1)
    print(f"{counted[CAUGHT]} of {len(faults)} faults were caught ({share:.0f} %), {counted[UNDECIDED]} undecided")
    sys.exit(counted[CAUGHT] < len(faults))


if __name__ == "__main__":
    main()
