"""Tests for sasstime, on SASS written here.  Run: pytest tools/sasstime"""

import contextlib
import io
import json
import os
import shutil
import tempfile
import unittest

from sasstime import item, machine, sass
from sasstime.cli import main
from sasstime.predict import read_description

HERE = os.path.dirname(os.path.abspath(__file__))


def control(stall=1, yields=False, write=7, read=7, wait=0):
    return (stall | (0 if yields else 16) | write << 5 | read << 8 | wait << 11) << 41


def listing(rows, name="toy"):
    """nvdisasm -hex text of a function. row: 'label:' or (instruction, control)."""
    out, addr = ["\t.target\tsm_90a", f'\t.section\t.text.{name},"ax",@progbits'], 0
    for row in rows:
        if isinstance(row, str):
            out.append(row)
            continue
        text, word = row
        out.append(f"        /*{addr:04x}*/                   {text} ;  /* 0x{0:016x} */")
        out.append(f"                                       /* 0x{word:016x} */")
        addr += 16
    return "\n".join(out) + "\n"


def loop(body, mma=1, shape="64x128x32", commit=True):
    """A loop of MMAs, a wait for them, then `body`."""
    rows = [".L_x_0:", ("WARPGROUP.ARRIVE", control(6))]
    for i in range(mma):
        last = ", gsb0" if commit and i == mma - 1 else ""
        rows.append((f"QGMMA.{shape}.F32.E4M3.E4M3 R24, R4, gdesc[UR8], R24{last}", control(12)))
    rows.append(("WARPGROUP.DEPBAR.LE gsb0, 0x0", control(2)))
    rows += body
    rows += [("@P0 BRA `(.L_x_0)", control(5)), ("EXIT", control(5))]
    return listing(rows)


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.dir)

    def write(self, name, text):
        path = os.path.join(self.dir, name)
        with open(path, "w") as f:
            f.write(text)
        return path

    def call(self, text, description=None, *argv):
        argv = [self.write("k.sass", text)] + list(argv)
        if description is not None:
            argv += ["-d", self.write("d.toml", description)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(argv)
            except SystemExit as e:
                code = e.code
        return code, out.getvalue(), err.getvalue()

    def clocks(self, text, description="[consumer]\nwarpgroups = 1\n", *argv):
        code, out, err = self.call(text, description, "--json", *argv)
        self.assertEqual(code, 0, err)
        return json.loads(out)[0]["clocks"]


class Control(unittest.TestCase):
    def test_fields(self):
        f = machine.control_fields(0x000E220000002100)  # S2R of a real kernel: stall 1, sets scoreboard 0
        self.assertEqual((f["stall"], f["wbar"], f["rbar"], f["wait"], f["yields"]), (1, 0, 7, 0, False))
        f = machine.control_fields(control(12, True, 3, 2, 0b101))
        self.assertEqual((f["stall"], f["yields"], f["wbar"], f["rbar"], f["wait"]), (12, True, 3, 2, 5))

    def test_mma(self):
        m = machine.decode_mma("QGMMA.64x128x32.F32.E4M3.E4M3", "R24, gdesc[UR8], R24", False)
        self.assertEqual((m["clocks"], m["bytes"]), (64, 128 * 32 + 64 * 32))
        m = machine.decode_mma("HGMMA.64x128x16.F32.BF16", "R24, R4, gdesc[UR8], R24", True)
        self.assertEqual((m["clocks"], m["bytes"]), (64, 128 * 32))


class Timing(Case):
    def test_exponentials_take_eight_clocks_each(self):
        few = self.clocks(loop([("MUFU.EX2 R%d, R%d" % (i, i), control(8)) for i in range(20, 30)]))
        many = self.clocks(loop([("MUFU.EX2 R%d, R%d" % (i, i), control(8)) for i in range(20, 60)]))
        self.assertAlmostEqual(many - few, 30 * 8, delta=2)

    def test_alu_takes_two_and_fma_one(self):
        base = self.clocks(loop([]))
        alu = self.clocks(loop([("VIMNMX3 R%d, R2, R3, R4, !PT" % (20 + i), control(1)) for i in range(64)]))
        fma = self.clocks(loop([("FFMA R%d, R2, R3, R5" % (20 + i), control(1)) for i in range(64)]))
        self.assertAlmostEqual(alu - base, 128, delta=3)
        self.assertAlmostEqual(fma - base, 64, delta=3)

    def test_scoreboard_holds_the_reader(self):
        pair = [("MUFU.EX2 R20, R20", control(1, write=0)), ("FADD R21, R20, R20", control(1, wait=1))]
        base = self.clocks(loop([]))
        self.assertAlmostEqual(self.clocks(loop(pair)) - base, machine.DEFAULTS["mufu_latency"] + 1, delta=2)
        slow = self.clocks(loop(pair), "[consumer]\nwarpgroups = 1\n", "--what-if", "mufu_latency=100")
        self.assertAlmostEqual(slow - base, 101, delta=2)

    def test_second_warpgroup_fills_the_gaps(self):
        body = [("MUFU.EX2 R%d, R%d" % (i, i), control(8)) for i in range(20, 84)]  # 512 clocks against 512 of MMA
        one = self.clocks(loop(body, mma=8))
        two = self.clocks(loop(body, mma=8), "[consumer]\nwarpgroups = 2\n")
        self.assertLess(two, 1.5 * one)  # twice the work
        self.assertGreaterEqual(two, 1024)  # the tensor cores bound it

    def test_operands_bound_narrow_mmas(self):
        wide = self.clocks(loop([], mma=16, shape="64x256x32"))
        self.assertGreaterEqual(wide, 16 * 128)
        slow = self.clocks(
            loop([], mma=16, shape="64x256x32"), "[consumer]\nwarpgroups = 1\n", "--what-if", "smem_bytes=32"
        )
        self.assertGreaterEqual(slow, 16 * 256)


class Branches(Case):
    BODY = (
        [("@P1 BRA `(.L_x_5)", control(5))]
        + [("FADD R%d, R2, R3" % (20 + i), control(1)) for i in range(64)]
        + [".L_x_5:", ("IADD3 R2, R2, 0x1, RZ", control(1))]
    )
    RULE = "[consumer]\nwarpgroups = 1\n[[consumer.branch]]\nname = 'promote'\nhas = { FADD = 60 }\nevery = %d\n"

    def test_rule_sets_how_often(self):
        never, always, second = (self.clocks(loop(self.BODY), self.RULE % n) for n in (0, 1, 2))
        self.assertGreater(always - never, 50)
        self.assertAlmostEqual(second, (never + always) / 2, delta=2)

    def test_command_line_overrides(self):
        a = self.clocks(loop(self.BODY), self.RULE % 2, "--every", "promote=0")
        self.assertAlmostEqual(a, self.clocks(loop(self.BODY), self.RULE % 0), delta=1)

    def test_default_is_reported(self):
        code, out, _ = self.call(loop(self.BODY))
        self.assertEqual(code, 0)
        self.assertIn("assumed", out)

    def test_stale_rule_fails(self):
        code, _, err = self.call(loop(self.BODY), "[[consumer.branch]]\nhas = { FMUL = 60 }\nevery = 0\n")
        self.assertEqual(code, 2)
        self.assertIn("stale", err)


class Descriptions(Case):
    def test_wrong_barrier_count_fails(self):
        code, _, err = self.call(loop([]), "[consumer]\nwaits = 2\n")
        self.assertEqual(code, 2)
        self.assertIn("mbarrier", err)

    def test_missing_order_barrier_fails(self):
        code, _, err = self.call(loop([]), "[consumer]\norder = true\n")
        self.assertEqual(code, 2)
        self.assertIn("order", err)

    def test_text_without_encodings_fails(self):
        code, _, _ = self.call("\n".join(l for l in loop([]).splitlines() if not l.strip().startswith("/* 0x")))
        self.assertNotEqual(code, 0)


class Reductions(Case):
    def test_they_are_a_floor(self):
        text, alone = loop([]), self.clocks(loop([]))
        describe = "reduced_bytes = {}\n[consumer]\nwarpgroups = 1\n".format
        self.assertEqual(self.clocks(text, describe(int(alone) * 28)), alone)
        self.assertEqual(self.clocks(text, describe(28000)), 1000)
        self.assertEqual(self.clocks(text, describe(28000), "--what-if", "reduce_bytes=14"), 2000)


class Checks(Case):
    def test_limits_set_the_exit_code(self):
        one = "[consumer]\nwarpgroups = 1\n"
        self.assertEqual(self.call(loop([]), one, "--max-clocks", "100000")[0], 0)
        self.assertEqual(self.call(loop([]), one, "--max-clocks", "10")[0], 1)
        self.assertEqual(self.call(loop([]), one, "--min-tensor-utilization", "99.9")[0], 1)


def item_listing(epilogue=0):
    """Work items: their barriers and those of K and V, around a loop of MMAs; `epilogue` additions behind it."""

    def wait(offset):
        return (f"SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4+{offset:#x}], R2", control(1, write=0))

    def arrive(offset):
        return (f"SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+{offset:#x}], RZ", control(1))

    use = ("IADD3 R9, R9, 0x1, RZ", control(1, wait=1))
    mma = [
        ("WARPGROUP.ARRIVE", control(6)),
        ("QGMMA.64x128x32.F32.E4M3.E4M3 R24, R4, gdesc[UR8], R24, gsb0", control(12)),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", control(2)),
    ]
    return listing(
        [".L_item:", wait(0x10), use, wait(0x20), use, *mma, arrive(0x40), wait(0x20), use]
        + [".L_main:", wait(0x30), use, *mma, arrive(0x40), ("@P2 BRA `(.L_last)", control(5)), wait(0x20), use]
        + [".L_last:", arrive(0x50), ("@P3 BRA `(.L_main)", control(5)), wait(0x30), use, *mma, arrive(0x50)]
        + [("FADD R20, R20, R3", control(4))] * epilogue
        + [arrive(0x60), ("@P4 BRA `(.L_item)", control(5)), ("EXIT", control(5))]
    )


class Items(Case):
    RINGS = "".join(
        f"[[ring]]\nname = '{name}'\nstages = 4\nbytes = 1024\nwait = {wait}\nrelease = {release}\n{ahead}"
        for name, wait, release, ahead in (("k", 1, 0, "ahead = 1\n"), ("v", 0, 1, ""))
    )
    ITEM = "[item]\nwaits = ['item', 'k', 'k', 'v']\nsignals = ['k', 'v', 'item']\nlast_skips = 'k'\nstages = 2\nbytes = 1024\n"

    def linear(self, epilogue=0, loads=0, warpgroups=2):
        text = f"[consumer]\nwarpgroups = {warpgroups}\n" + self.RINGS + self.ITEM + f"dependent_loads = {loads}\n"
        description = read_description(self.write("d.toml", text))
        (fn,) = sass.load(self.write("k.sass", item_listing(epilogue)))
        block = self.clocks(item_listing(epilogue), text)
        return *item.linear(fn, description, dict(machine.DEFAULTS)), block

    def test_a_block_costs_what_the_loop_does(self):
        _, slope, block = self.linear()
        self.assertAlmostEqual(slope, block, delta=0.03 * block)

    def test_an_epilogue_costs_its_length(self):
        none, some = self.linear(warpgroups=1)[0], self.linear(epilogue=500, warpgroups=1)[0]
        self.assertAlmostEqual(some - none, 500 * 4, delta=200)

    def test_a_late_producer_costs_the_way_to_memory(self):
        self.assertGreater(self.linear(loads=10)[0] - self.linear()[0], 0.5 * 10 * machine.DEFAULTS["global_latency"])

    def test_wrong_barriers_fail(self):
        self.ITEM = self.ITEM.replace("'k', 'k'", "'k'")
        with self.assertRaises(sass.Mismatch):
            self.linear()


if __name__ == "__main__":
    unittest.main()
