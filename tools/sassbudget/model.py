"""The machine model: what a warp instruction costs on each pipe of one SM of sm_90. The README says where each rate is from."""

import re

# Rates are lanes per clock per SM on sm_90.  An SM has 4 sub-partitions (SMSP), each issuing one
# warp instruction per clock, so a warp instruction holds a pipe for 128 / rate clocks of its SMSP.
# A rate shared by the whole SM (lsu, smem) fits the same formula: 4 SMSPs, 32 lanes.
RATES = {
    "issue": 128,  # 1 warp instruction / clk / SMSP
    "fma": 128,  # FFMA FMUL FADD, and half2 on the paired heavy+lite pipes
    "fmaheavy": 64,  # IMAD and IDP only run on the heavy half
    "alu": 64,  # integer, logic, compare, select, min/max, shift, permute
    "f2fp_unpack": 64,  # F2FP x2 unpacks: 64 measured on H100
    "f2fp_pack": 64,  # F2FP x2 packs: see README; --rate f2fp_pack=32 prices them like sm_103
    "mufu": 16,  # EX2 RCP LG2 RSQ SIN COS TANH SQRT
    "xu": 16,  # F2F I2F F2I FRND POPC FLO BREV; same unit as mufu
    "fp64": 64,
    "lsu": 32,  # one 128-byte wavefront / clk / SM, also SHFL
    "uniform": 128,  # not known; never above issue
}
SMEM_BYTES_PER_CLK = 128
TENSOR_FLOPS_PER_CLK = {
    "QGMMA": 8192,
    "IGMMA": 8192,
    "HGMMA": 4096,
    "TF32": 2048,
    "HMMA": 4096,
    "IMMA": 8192,
    "QMMA": 8192,
}
PIPES = ["issue", "tensor", "mufu", "fma", "fmaheavy", "alu", "lsu", "smem", "uniform", "fp64"]
CLASSES = [
    "tensor",
    "mufu",
    "fma",
    "imad",
    "alu",
    "cvt",
    "lds/sts",
    "ldsm/stsm",
    "shfl",
    "global",
    "spill",
    "const",
    "uniform",
    "tma",
    "sync",
    "wgsync",
    "control",
    "other",
]

_FMA = set(
    [
        "FFMA",
        "FMUL",
        "FADD",
        "FFMA32I",
        "FMUL32I",
        "FADD32I",
        "FSWZADD",
        "HFMA2",
        "HADD2",
        "HMUL2",
        "HADD2_32I",
        "HFMA2_32I",
        "HMUL2_32I",
        "FFMA2",
        "FMUL2",
        "FADD2",
    ]
)
_IMAD = set(["IMAD", "IDP", "IDP4A", "IMUL"])
_ALU = set(
    [
        "IADD3",
        "IADD",
        "LOP3",
        "LOP",
        "ISETP",
        "FSETP",
        "FSET",
        "HSET2",
        "HSETP2",
        "FSEL",
        "SEL",
        "FMNMX",
        "FMNMX3",
        "HMNMX2",
        "VHMNMX",
        "IMNMX",
        "VIMNMX",
        "VIMNMX3",
        "VIADD",
        "VIADDMNMX",
        "LEA",
        "SHF",
        "SHL",
        "SHR",
        "PRMT",
        "PLOP3",
        "MOV",
        "IABS",
        "BMSK",
        "SGXT",
        "P2R",
        "R2P",
        "FCHK",
        "VOTE",
        "CS2R",
        "I2FP",
        "I2IP",
        "VABSDIFF",
        "VABSDIFF4",
        "ISCADD",
        "LOP32I",
        "IADD32I",
        "MOV32I",
        "PSETP",
        "PSET",
    ]
)
_XU = set(["F2F", "F2I", "I2F", "I2I", "FRND", "POPC", "FLO", "BREV", "REDUX", "S2R"])
_FP64 = set(["DFMA", "DADD", "DMUL", "DSETP", "DMNMX", "DMMA"])
_CONTROL = set(
    [
        "BRA",
        "BRX",
        "BRXU",
        "JMP",
        "JMX",
        "JMXU",
        "CALL",
        "RET",
        "EXIT",
        "KILL",
        "BSSY",
        "BSYNC",
        "BREAK",
        "BMOV",
        "BPT",
        "NOP",
        "WARPSYNC",
        "YIELD",
        "RPCMOV",
        "LEPC",
        "PREEXIT",
        "ELECT",
        "ACQBULK",
    ]
)
_SYNC = set(
    [
        "BAR",
        "SYNCS",
        "MEMBAR",
        "FENCE",
        "ERRBAR",
        "CCTL",
        "DEPBAR",
        "LDGDEPBAR",
        "NANOSLEEP",
        "UCGABAR_ARV",
        "UCGABAR_WAIT",
        "ARRIVES",
        "CGAERRBAR",
    ]
)
_TMA = set(["UTMALDG", "UTMASTG", "UTMAREDG", "UTMAPF", "UTMACCTL", "UTMACMDFLUSH", "UBLKCP", "UBLKRED", "UBLKPF"])
_WG = set(["WARPGROUP", "WARPGROUPSET", "USETMAXREG"])
_GLOBAL = set(["LDG", "STG", "LD", "ST", "LDGSTS", "RED", "ATOM", "ATOMG", "REDG"])
_SHARED = set(["LDS", "STS", "ATOMS"])


def cycles(pipe, rates):
    return 128.0 / rates[pipe]


def gmma_shape(op):
    m = re.search(r"\.(\d+)x(\d+)x(\d+)", op)
    return tuple(map(int, m.groups())) if m else None


def vector_bytes(op):
    """Bytes per lane of a load or store, from its width suffix."""
    for suffix, n in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if suffix in op:
            return n
    return 4


def classify(op, args, rates):
    """-> (class, {pipe: SMSP clocks}, FLOPs of one warpgroup) for one warp instruction.

    Tensor clocks are for one warpgroup: each of its 4 warps sits on its own SMSP and tensor core.
    """
    base = op.split(".")[0]
    cost = {"issue": 1.0}
    flops = 0
    if base.endswith("GMMA"):
        shape = gmma_shape(op) or (64, 0, 0)
        m, n, k = shape
        flops = 2 * m * n * k
        rate = TENSOR_FLOPS_PER_CLK.get("TF32" if ".TF32" in op else base, 8192)
        sparse = 2 if ".SP" in op else 1
        cost["tensor"] = flops / (rate * sparse)
        row = 32 * sparse  # bytes of K per row of B
        operands = [a.strip() for a in args.split(",")]
        from_smem = len(operands) > 1 and operands[1].startswith("gdesc")
        cost["smem"] = (n * row + (m * 32 if from_smem else 0)) / SMEM_BYTES_PER_CLK
        return "tensor", cost, flops
    if base in ("HMMA", "IMMA", "QMMA", "BMMA"):
        m = re.search(r"\.(16|8)(8|16)(\d+)", op)
        if m:
            warp = 2 * int(m[1]) * int(m[2]) * int(m[3])
            rate = TENSOR_FLOPS_PER_CLK.get(base, 4096)
            if base == "HMMA" and ".TF32" in op:
                rate = TENSOR_FLOPS_PER_CLK["TF32"]
            cost["tensor"] = warp / (rate / 4)
            flops = 4 * warp
        return "tensor", cost, flops
    if base == "MUFU":
        cost["mufu"] = cycles("mufu", rates)
        return "mufu", cost, 0
    if base in _FMA:
        cost["fma"] = cycles("fma", rates)
        if base.startswith("H"):
            cost["fmaheavy"] = 1.0
        return "fma", cost, 0
    if base in _IMAD:
        cost["fma"] = cycles("fma", rates)
        cost["fmaheavy"] = cycles("fmaheavy", rates)
        return "imad", cost, 0
    if base == "F2FP":
        cost["alu"] = cycles("f2fp_unpack" if "UNPACK" in op else "f2fp_pack", rates)
        return "cvt", cost, 0
    if base in _XU:
        cost["mufu"] = cycles("xu", rates)
        return ("cvt" if base in ("F2F", "F2I", "I2F", "I2I", "FRND") else "alu"), cost, 0
    if base in _ALU:
        cost["alu"] = cycles("alu", rates)
        return ("cvt" if base in ("I2FP", "I2IP") else "alu"), cost, 0
    if base in _FP64:
        cost["fp64"] = cycles("fp64", rates)
        return "other", cost, 0
    if base in ("LDSM", "STSM", "MOVM"):
        waves = 4 if ".4" in op else 2 if ".2" in op else 1
        cost["lsu"] = waves * cycles("lsu", rates)
        cost["smem"] = waves * 128 * 4 / SMEM_BYTES_PER_CLK
        return "ldsm/stsm", cost, 0
    if base in _SHARED:
        waves = max(1, vector_bytes(op) // 4)
        cost["lsu"] = waves * cycles("lsu", rates)
        cost["smem"] = 4.0 * waves
        return "lds/sts", cost, 0
    if base == "SHFL":
        cost["lsu"] = cycles("lsu", rates)
        return "shfl", cost, 0
    if base in ("LDL", "STL"):
        cost["lsu"] = max(1, vector_bytes(op) // 4) * cycles("lsu", rates)
        return "spill", cost, 0
    if base in _GLOBAL:
        cost["lsu"] = max(1, vector_bytes(op) // 4) * cycles("lsu", rates)
        return "global", cost, 0
    if base in ("LDC", "LDCU", "ULDC"):
        return "const", cost, 0
    if base in _TMA:
        return "tma", cost, 0
    if base in _WG:
        return "wgsync", cost, 0
    if base in _SYNC or base.startswith("UCGABAR"):
        return "sync", cost, 0
    if base in _CONTROL:
        return "control", cost, 0
    if base.startswith("U") or base in ("R2UR", "S2UR", "VOTEU", "S2UR", "UP2UR"):
        cost["uniform"] = cycles("uniform", rates)
        return "uniform", cost, 0
    return "other", cost, 0
