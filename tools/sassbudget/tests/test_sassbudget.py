"""Tests for sassbudget.  Run: pytest tools/sassbudget"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import tempfile
import unittest

from sassbudget.binary import find_tool
from sassbudget.cli import main
from sassbudget.model import CLASSES, PIPES, RATES, classify
from sassbudget.report import short

HERE = os.path.dirname(os.path.abspath(__file__))
LABELS = os.path.join(HERE, "fixtures", "labels.sass")
ABSOLUTE = os.path.join(HERE, "fixtures", "absolute.sass")


def run(*argv):
    """-> (exit code, stdout, stderr) of the command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(argv))
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


def kernels(*argv):
    code, out, err = run("--json", *argv)
    assert code == 0, err
    return json.loads(out)


def by_role(kernel, role):
    return [l for l in kernel["loops"] if l["role"] == role]


class Labels(unittest.TestCase):
    """The warp-specialised fixture: an mma loop, a producer loop, two spins."""

    def setUp(self):
        (self.kernel,) = kernels(LABELS, "-n", "2")
        (self.main,) = by_role(self.kernel, "mma")

    def test_loops_found(self):
        self.assertEqual((self.main["header"], self.main["latch"]), (0x40, 0x140))
        (producer,) = by_role(self.kernel, "producer")
        self.assertEqual((producer["header"], producer["latch"]), (0x180, 0x1D0))
        self.assertEqual(producer["warpgroups"], 1)
        self.assertEqual([l["header"] for l in by_role(self.kernel, "spin")], [0x1F0, 0x220])

    def test_conditional_code_is_not_in_the_bound(self):
        self.assertEqual(self.main["mix"]["fma"], 1)
        self.assertEqual(self.main["conditional_mix"]["fma"], 2)
        (everything,) = by_role(kernels(LABELS, "--all-paths")[0], "mma")
        self.assertEqual(everything["mix"]["fma"], 3)

    def test_tensor_cycles_and_flops(self):
        # e4m3 m64n128k32: 64 clk; m64n256k32: 128 clk; bf16 m64n64k16: 32 clk.
        self.assertEqual(self.main["per_warpgroup_cycles"]["tensor"], 64 + 128 + 32)
        self.assertEqual(self.main["cycles"]["tensor"], 2 * 224)
        flops = 2 * 64 * (128 * 32 + 256 * 32 + 64 * 16)
        self.assertEqual(self.main["flops"], 2 * flops)

    def test_operand_bytes_from_shared_memory(self):
        # B of each, plus A (2 KiB) of the two that read A from shared memory, at 128 B / clk.
        want = (128 * 32 + 2048 + 256 * 32 + 64 * 32 + 2048) / 128
        self.assertEqual(self.main["per_warpgroup_cycles"]["smem"], want)

    def test_pipes(self):
        one = self.main["per_warpgroup_cycles"]
        self.assertEqual(one["mufu"], 8)
        self.assertEqual(one["alu"], 3 * 2)  # FMNMX, F2FP, ISETP
        self.assertEqual(one["fma"], 1)
        self.assertEqual(one["issue"], self.main["instructions"])
        self.assertEqual(self.main["limit"], "tensor")

    def test_bound(self):
        want = self.main["flops"] / 448 * 1.755e9 * 132 / 1e12
        self.assertAlmostEqual(self.main["bound_tflops"], want, delta=0.1)
        (half,) = by_role(kernels(LABELS, "-n", "2", "--sms", "66")[0], "mma")
        self.assertAlmostEqual(half["bound_tflops"], want / 2, delta=0.1)

    def test_source_and_setmaxnreg(self):
        self.assertEqual(self.main["source"], "mainloop.hpp:10-30")
        self.assertEqual(self.kernel["setmaxnreg"], [0x18, 0xF0])

    def test_rate_override(self):
        (loop,) = by_role(kernels(LABELS, "--rate", "f2fp_pack=32")[0], "mma")
        self.assertEqual(loop["per_warpgroup_cycles"]["alu"], 2 * 2 + 4)
        self.assertEqual(run(LABELS, "--rate", "nonsense=3")[0], 2)

    def test_add_loop(self):
        (producer,) = by_role(self.kernel, "producer")
        (loop,) = by_role(kernels(LABELS, "-n", "2", "--add-loop", str(producer["loop"]))[0], "mma")
        self.assertEqual(
            loop["cycles"]["issue"], self.main["cycles"]["issue"] + producer["per_warpgroup_cycles"]["issue"]
        )


class Absolute(unittest.TestCase):
    """The cuobjdump-style fixture: two nested loops, absolute branch targets."""

    def setUp(self):
        (self.kernel,) = kernels(ABSOLUTE)
        self.outer, self.inner = sorted(self.kernel["loops"], key=lambda l: l["depth"])

    def test_nesting(self):
        self.assertEqual((self.outer["header"], self.inner["header"]), (0x20, 0x30))
        self.assertEqual(self.inner["parent"], self.outer["loop"])
        self.assertEqual(self.outer["contains"], [self.inner["loop"]])
        self.assertEqual(self.outer["role"], "outer")

    def test_inner_work_is_not_in_the_outer_loop(self):
        self.assertEqual(self.inner["instructions"], 5)
        self.assertEqual(self.outer["instructions"], 4)

    def test_wide_shared_accesses(self):
        one = self.inner["per_warpgroup_cycles"]
        self.assertEqual(one["lsu"], 16 + 16)  # LDS.128 and LDSM.4: 4 wavefronts each
        self.assertEqual(one["fmaheavy"], 2)  # IMAD
        self.assertEqual(one["mufu"], 8)  # F2F runs on the XU

    def test_half2_uses_both_fma_pipes(self):
        self.assertEqual(self.outer["per_warpgroup_cycles"]["fma"], 1)
        self.assertEqual(self.outer["mix"]["shfl"], 1)


class Names(unittest.TestCase):
    def test_short(self):
        self.assertEqual(
            short("void ns::kernel<a::b::T<(int)2, cute::C<(int)128>, (bool)1>>(P)"), "kernel<T<2, 128, 1>>(P)"
        )

    def test_every_class_and_pipe_is_known(self):
        for op in (
            "LDG.E.128",
            "UTMALDG.4D",
            "BAR.SYNC",
            "UIADD3",
            "R2UR",
            "HMMA.16816.F32",
            "F2I.S32",
            "STSM.16.M88.4",
            "IMAD.MOV.U32",
            "I2FP.F32.S32",
            "WARPGROUP.ARRIVE",
            "DFMA",
            "XYZZY",
        ):
            klass, cost, _ = classify(op, "R0, R1", RATES)
            self.assertIn(klass, CLASSES)
            self.assertLessEqual(set(cost), set(PIPES))


class CommandLine(unittest.TestCase):
    def test_checks(self):
        self.assertEqual(run(LABELS, "--max-loop-spills", "0", "--require", "QGMMA,UTMALDG")[0], 0)
        code, _, err = run(LABELS, "--max-spills", "0")
        self.assertEqual(code, 1)
        self.assertIn("2 spill instructions, allowed 0", err)
        self.assertEqual(run(LABELS, "--require", "QGMMA,IGMMA")[0], 1)
        self.assertEqual(run(LABELS, "--forbid", "HMMA")[0], 0)
        self.assertEqual(run(LABELS, "--forbid", "LDL")[0], 1)
        self.assertEqual(run(LABELS, "-n", "2", "--min-tflops", "1e6")[0], 1)

    def test_usage_errors_exit_2(self):
        self.assertEqual(run()[0], 2)
        self.assertEqual(run(LABELS, "-k", "absent")[0], 2)
        self.assertEqual(run(os.path.join(HERE, "no_such_file"))[0], 2)

    def test_report_names_the_limit(self):
        code, out, _ = run(LABELS, "-n", "2")
        self.assertEqual(code, 0)
        self.assertIn("limited by tensor", out)
        self.assertIn("<- limit", out)

    def test_show_loop(self):
        (main,) = by_role(kernels(LABELS)[0], "mma")
        code, out, _ = run(LABELS, "--show-loop", str(main["loop"]))
        self.assertEqual(code, 0)
        self.assertIn("mufu:8", out)
        self.assertIn("cond", out)

    def test_diff(self):
        with tempfile.TemporaryDirectory() as tmp:
            other = os.path.join(tmp, "b.sass")
            with open(LABELS) as f:
                text = f.read().replace("MUFU.EX2 R4, R4", "FADD.FTZ R4, R4, R4")
            with open(other, "w") as f:
                f.write(text)
            code, out, _ = run("--diff", LABELS, other)
            self.assertEqual(code, 0)
            self.assertRegex(out, r"mma MUFU\.EX2 +1 -> 0 +-1")
            self.assertIn("no change", run("--diff", LABELS, LABELS)[1])


def find_nvcc():
    home = os.path.join(os.environ.get("CUDA_HOME", ""), "bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path=home)


@unittest.skipUnless(find_nvcc(), "no nvcc")
@unittest.skipUnless(find_tool("nvdisasm", required=False), "no nvdisasm")
class Compiled(unittest.TestCase):
    """The toy kernels, through nvcc, as cubin and as object."""

    @classmethod
    def setUpClass(cls):
        cls.tmp = tempfile.TemporaryDirectory()
        for flag, name in (("-cubin", "toy.cubin"), ("-c", "toy.o")):
            subprocess.run(
                [
                    find_nvcc(),
                    flag,
                    "-O3",
                    "-lineinfo",
                    "-gencode",
                    "arch=compute_90a,code=sm_90a",
                    os.path.join(HERE, "toy.cu"),
                    "-o",
                    os.path.join(cls.tmp.name, name),
                ],
                check=True,
            )

    @classmethod
    def tearDownClass(cls):
        cls.tmp.cleanup()

    def path(self, name):
        return os.path.join(self.tmp.name, name)

    def test_exp_loop(self):
        (k,) = kernels(self.path("toy.cubin"), "-k", "exp_loop", "-n", "4")
        (loop,) = by_role(k, "math")
        self.assertEqual(loop["ops"]["MUFU.EX2"], 8)
        self.assertEqual(loop["ops"]["FFMA"], 8)
        self.assertEqual((loop["limit"], loop["bound_cycles"]), ("mufu", 4 * 64))
        self.assertGreater(k["registers"], 8)
        self.assertEqual(k["spill_loads"] + k["spill_stores"], 0)
        self.assertTrue(loop["source"].startswith("toy.cu:"))
        self.assertGreaterEqual(loop["peak_live_registers"], 8)

    def test_nested_loop(self):
        (k,) = kernels(self.path("toy.cubin"), "-k", "nested_loop")
        inner = [l for l in k["loops"] if l["mix"].get("cvt")]
        self.assertEqual([l["mix"]["cvt"] for l in inner], [4])
        self.assertGreaterEqual(inner[0]["depth"], 1)

    @unittest.skipUnless(find_tool("cuobjdump", required=False), "no cuobjdump")
    def test_object_equals_cubin(self):
        a, b = kernels(self.path("toy.cubin")), kernels(self.path("toy.o"))
        self.assertEqual(sorted(x["name"] for x in a), sorted(x["name"] for x in b))
        self.assertEqual([x["loops"] for x in a], [x["loops"] for x in b])


if __name__ == "__main__":
    unittest.main()
