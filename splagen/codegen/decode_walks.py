"""The blocks that a decoding step attends to: how many there are, and how a split of them is walked."""

from __future__ import annotations

from collections.abc import Iterable

from splagen.codegen.tile_code import Walk
from splagen.ir.program import Var

WAIT = "wait_for_earlier(launch_pdl)"  # for what the kernel launched before writes


def chosen_count(walk: Walk) -> list[str]:
    """Lines that count the blocks chosen, as `chosen`: all that may be, up to the budget."""
    return [*walk.eligible_count(), "chosen = tl.minimum(eligible, BUDGET)"]


def walks(walk: Walk, late: Iterable[Var]) -> list[tuple[str, dict[Var, bool], dict[str, object]]]:
    """The loops: title, facts, which part a split takes, and how a block is found one visit ahead of its keys.

    Blocks seen by position are walked while others are being chosen, by the last splits first: these have the fewest of
    those chosen.  `late` are the masks of blocks that became far since a step's first token, which are in neither.
    """
    settled = dict.fromkeys(late, False)
    found = [("blocks seen by position", walk.forced_facts | settled, _forced(walk))]
    if not walk.chosen:
        return found
    return [*found, ("blocks chosen", walk.chosen_facts | settled, _chosen(walk))]


def _forced(walk: Walk) -> dict[str, object]:
    names = {"T": "tile", "L": "L"}
    setup, count, block = walk.forced("J", names, "nJ", "i")
    _, _, following = walk.forced("J", names, "nJ", "following")
    page = "tl.load(page_table_ptr + b * MAX_PAGES + ({}) * BLOCK // PAGE, mask={}, other=0)"
    return {
        "setup": "\n".join(setup),
        "count": count,
        "part": "(SPLITS - 1 - split)",
        "ahead": f"following = first // PARTS\nahead = {page.format(following, 'first < last')}",
        "visit": "\n".join([
            f"j = {block}",
            "page = tl.where((ahead >= 0) & (ahead < PAGES), ahead, 0).to(tl.int64)",
            "origin_of_block = (page * Hkv + h) * PAGE + j * BLOCK % PAGE",
            "following = (step + 1) // PARTS",
            f"ahead = {page.format(following, 'step + 1 < last')}",
        ]),
    }  # fmt: skip


def _chosen(walk: Walk) -> dict[str, object]:
    loads = (
        "ahead = tl.load(block_indices_ptr + list_at + following, mask={0}, other=0)\n"
        "ahead_place = tl.load(block_places_ptr + list_at + following, mask={0}, other=0)"
    )
    return {
        "setup": "\n".join([*chosen_count(walk), WAIT, "list_at = (r * Hkv + h) * BUDGET"]),
        "count": "chosen",
        "part": "split",
        "ahead": "following = first // PARTS\n" + loads.format("first < last"),
        "visit": "\n".join([
            "j = ahead",
            "origin_of_block = ahead_place.to(tl.int64) * BLOCK",
            "following = (step + 1) // PARTS",
            loads.format("step + 1 < last"),
        ]),
    }  # fmt: skip
