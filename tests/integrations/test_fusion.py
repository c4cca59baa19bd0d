"""What the integrations share, on a class of the test."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest

from fastvae.integrations.fusion import Report, class_name, exchange, report_of, restore

NONE_OF_THEM = """
import sys
import fastvae.integrations
assert not {"diffusers", "pythae", "scvi", "lightning", "accelerate"} & set(sys.modules)
"""


class Host:
    factor = 2

    def value(self, x: int) -> int:
        return self.factor * x


def fused_value(host: Host, x: int) -> int:
    return -host.factor * x


REPORT = Report("a.Host", {"value": "negative"}, {"factor": "it is a number"}, {"value": "has the wrong sign"})


def test_importing_the_package_imports_no_other_library():
    subprocess.run([sys.executable, "-c", NONE_OF_THEM], check=True)


def test_the_methods_of_one_object_are_exchanged_and_given_back():
    host, other = Host(), Host()
    before = dict(vars(host))
    report = exchange(host, REPORT, {"value": fused_value})
    assert (host.value(3), other.value(3), Host.value(host, 3)) == (-6, 6, 6)
    assert report_of(host) is report and report.methods == ("value",)
    assert exchange(host, REPORT, {"value": fused_value}).methods == ("value",)  # anew
    restore(host)
    assert host.value(3) == 6 and vars(host) == before and report_of(host) is None
    restore(host)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda host: pickle.loads(pickle.dumps(host))], ids=["deep", "pickle"]
)
def test_a_copy_calls_itself(copied):
    host = Host()
    exchange(host, REPORT, {"value": fused_value})
    other = copied(host)
    other.factor = 5
    assert (other.value(1), host.value(1)) == (-5, -2)
    restore(other)
    assert (other.value(1), host.value(1)) == (5, -2)


def test_a_method_that_other_code_replaced_stays():
    host = Host()
    host.value = lambda x: 7  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"\.Host\.value was replaced on this object"):
        exchange(host, REPORT, {"twice": fused_value, "value": fused_value})
    assert host.value(1) == 7 and report_of(host) is None and not hasattr(host, "twice")


def test_the_report_is_a_text():
    assert str(REPORT).splitlines() == [
        "a.Host: 1 fused, 1 kept",
        "  fused: value: negative",
        "  kept: factor: it is a number",
        "  as the library has it: value: has the wrong sign",
    ]
    assert class_name(REPORT) == "fastvae.Report"
