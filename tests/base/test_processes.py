"""Several processes on one run, and signals that wait for the end of a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import SimpleNamespace

import accelerate
import pytest

from mopo_cli.base import processes
from mopo_cli.base.errors import UserError
from mopo_cli.base.processes import build_accelerator, deferred_interrupts

BOTH = (signal.SIGINT, signal.SIGTERM)


class TestInterrupts:
    def sent(self, *numbers: signal.Signals) -> list[object]:
        """Whether a signal is known before they come and after each; then KeyboardInterrupt, and the handlers then."""
        seen: list[object] = []
        with pytest.raises(KeyboardInterrupt):
            self._body(numbers, seen)
        return seen

    def _body(self, numbers: Sequence[signal.Signals], seen: list[object]) -> None:
        with deferred_interrupts() as interrupted:
            seen.append(interrupted())
            try:
                for number in numbers:
                    os.kill(os.getpid(), number)
                    seen.append(interrupted())
            except KeyboardInterrupt:
                seen += [signal.getsignal(number) for number in BOTH]
                raise

    @pytest.mark.parametrize("number", BOTH)
    def test_one_waits_for_the_end(self, number: signal.Signals, capfd: pytest.CaptureFixture[str]):
        before = signal.getsignal(number)
        assert self.sent(number) == [False, True]
        assert signal.getsignal(number) is before
        assert capfd.readouterr().err == "stopping at the end of this step, with a checkpoint; once more: at once\n"

    def test_what_a_terminal_and_a_launcher_send_together_is_one(self):
        assert self.sent(*BOTH) == [False, True, True]

    def test_a_second_acts_at_once_and_a_third_as_the_system_does(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(processes, "SAME", 0.0)
        before = [signal.getsignal(number) for number in BOTH]
        assert self.sent(*BOTH) == [False, True, signal.SIG_DFL, signal.SIG_DFL]
        assert [signal.getsignal(number) for number in BOTH] == before

    def test_a_process_that_is_deaf_to_ctrl_c_stays_so(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with deferred_interrupts() as interrupted:
                os.kill(os.getpid(), signal.SIGINT)
                assert not interrupted()
        finally:
            signal.signal(signal.SIGINT, before)


class TestLaunchers:
    def test_processes_that_do_not_see_each_other_are_refused(self, monkeypatch: pytest.MonkeyPatch):
        alone = SimpleNamespace(distributed_type=SimpleNamespace(value="NO"), num_processes=1)
        monkeypatch.setattr(accelerate, "Accelerator", lambda **_: alone)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match=r"WORLD_SIZE=2: .* sees 1, .* ACCELERATE_USE_CPU=true"):
            build_accelerator()
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert build_accelerator() is alone
