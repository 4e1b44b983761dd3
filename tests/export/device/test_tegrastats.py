"""The power of Jetson modules from lines as their tools print them."""

from __future__ import annotations

import pytest

from export.device.tegrastats import rails_of, typical_mw, whole_mw
from export.errors import ExportError

NANO = (
    "RAM 1903/3956MB (lfb 1x4MB) SWAP 8/1978MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [15%@921,11%@921] EMC_FREQ 0% "
    "GR3D_FREQ 99% PLL@35C CPU@38C POM_5V_IN 5532/4823 POM_5V_GPU 2012/1500 POM_5V_CPU 720/700"
)
ORIN_NANO = (
    "11-20-2026 12:00:00 RAM 2448/7764MB (lfb 4x4MB) SWAP 0/3882MB (cached 0MB) CPU [3%@1510,2%@1510] GR3D_FREQ "
    "99%@[624] cpu@47.2C VDD_IN 9832mW/9433mW VDD_CPU_GPU_CV 4321mW/4100mW VDD_SOC 2110mW/2100mW"
)
AGX_ORIN = (
    "RAM 9012/30588MB (lfb 4x4MB) GR3D_FREQ 99%@[1300,1300] GPU@69.1C VDD_GPU_SOC 13150mW/12971mW VDD_CPU_CV "
    "1431mW/1241mW VIN_SYS_5V0 4968mW/5048mW VDDQ_VDD2_1V8AO 1091mW/1091mW"
)
AGX_XAVIER = (
    "RAM 2612/15692MB (lfb 3x4MB) GR3D_FREQ 98% GPU@40C GPU 7123/6900 CPU 930/910 SOC 2480/2400 CV 0/0 VDDRQ 1240/1200 "
    "SYS5V 2320/2300"
)


@pytest.mark.parametrize(
    ("line", "power"),
    [
        (NANO, 5532.0),
        (ORIN_NANO, 9832.0),
        (AGX_ORIN, 13150.0 + 1431 + 4968),  # the fourth rail is fed by the third
        (AGX_XAVIER, 7123.0 + 930 + 2480 + 0 + 1240 + 2320),
        ("RAM 2448/7764MB VIN 30000mW/28000mW VDD_GPU 9000mW/8000mW", 30000.0),
        ("RAM 2448/7764MB (lfb 4x4MB) CPU [3%@1510] GR3D_FREQ 0%", None),
        ("", None),
    ],
)
def test_the_whole_module(line: str, power: float | None) -> None:
    assert whole_mw(line) == power
    assert "RAM" not in rails_of(line)
    assert "SWAP" not in rails_of(line)


def test_the_readings_before_and_after_do_not_count() -> None:
    idle, busy = ORIN_NANO.replace("VDD_IN 9832", "VDD_IN 3000"), ORIN_NANO
    assert typical_mw("\n".join([idle] * 8 + [busy] * 40 + [idle] * 6), "a log") == 9832.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a log has 0 readings .* no rail"),
        ("\n".join([ORIN_NANO] * 9), "a log has 9 readings"),
        ("\n".join(["VDD_GPU 9000mW/8000mW"] * 50), "a log has 0 readings .*its rails: VDD_GPU"),
        ("\n".join([NANO.replace("5532", "0")] * 50), "a log has 0 readings"),
    ],
)
def test_too_few_readings_are_refused(text: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        typical_mw(text, "a log")
