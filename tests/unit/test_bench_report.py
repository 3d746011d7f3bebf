"""What the scenarios make of their rows, and what is written of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from benchmarks import fairness, main, noisy_neighbour, report
from benchmarks.load import RequestRecord
from benchmarks.report import PLAIN, SEATS, Check, Table
from benchmarks.seats import Seat, write_entitlements
from benchmarks.servers import Launch, ServerStartError, running
from contract.entitlements import parse_entitlements
from contract.keys import KeyKind, is_key, key_sha256

_CLEAN = {"max_lag_s": 0.0, "idle_server_cores": 0.0}


def _noisy(ttft_s: dict[str, float], ok: bool = True) -> report.Result:
    labels = [
        {"system": system, "condition": condition, "round": 1}
        for system in (PLAIN, SEATS)
        for condition in (noisy_neighbour.ALONE, noisy_neighbour.BESIDE)
    ]
    rates = {"quiet_tok_s": 10.0, "noisy_tok_s": 90.0, "total_tok_s": 100.0}
    requests = [
        {**label, "ttft_s": ttft_s[str(label["system"])], "decode_tok_s": 50.0, "ok": ok}
        for label in labels
        for _ in range(5)
    ]
    config = {"seed": 1, "noisy_streams": 64, "max_num_seqs": 32}
    return noisy_neighbour.summarize(config, [{**label, **rates, **_CLEAN} for label in labels], requests)


def test_quiet_seat_target_is_plain_over_ours() -> None:
    met = _noisy({PLAIN: 4.0, SEATS: 1.0})
    assert met.figures["ttft_p99_ratio_plain_over_seats"]["value"] == pytest.approx(4.0)
    assert all(check.met for check in met.checks)
    assert not _noisy({PLAIN: 2.0, SEATS: 1.0}).checks[0].met


def test_results_name_no_folder_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = _noisy({PLAIN: 4.0, SEATS: 1.0})
    result.config.update(model=str(tmp_path / "var" / "demo-model"), folder=tmp_path.parent / "out", seed=2)
    data, _ = report.write_text(result, tmp_path)
    told = json.loads(data.read_text())["config"]
    assert (told["model"], told["folder"], told["seed"]) == ("var/demo-model", "out", 2)

    result.config["model"] = "Qwen/Qwen3-0.6B"
    report.write_text(result, tmp_path)
    assert json.loads(data.read_text())["config"]["model"] == "Qwen/Qwen3-0.6B"


def test_what_is_no_number_in_json_is_null(tmp_path: Path) -> None:
    result = _noisy({PLAIN: 4.0, SEATS: 1.0})
    result.figures["ratio"] = {"value": 1.5, "low": float("nan"), "edge": float("inf")}
    data, _ = report.write_text(result, tmp_path)
    assert json.loads(data.read_text())["figures"]["ratio"] == {"value": 1.5, "low": None, "edge": None}


def test_failed_quiet_requests_miss_the_target() -> None:
    assert not _noisy({PLAIN: 4.0, SEATS: 1.0}, ok=False).checks[1].met


def test_a_refusal_is_no_fast_first_token() -> None:
    refused = RequestRecord("quiet", due_s=0.0, sent_s=0.0, input_tokens=1, max_tokens=1)
    refused.finished_s, refused.status, refused.error = 0.002, 429, "too many"
    assert noisy_neighbour._request(refused)["ttft_s"] is None
    given_up = RequestRecord("quiet", due_s=0.0, sent_s=0.0, input_tokens=1, max_tokens=1)
    given_up.finished_s, given_up.cut = 30.0, True
    assert noisy_neighbour._request(given_up)["ttft_s"] == 30.0


def _fair(ratio: float, ours_tok_s: float) -> report.Result:
    case = "weights 1:3, connections 160:40"
    shares: list[dict[str, Any]] = [
        {
            "part": "shares",
            "system": system,
            "case": case,
            "round": number,
            "ratio": ratio,
            "total_tok_s": 100.0,
        }
        for system in (PLAIN, SEATS)
        for number in (1, 2, 3)
    ]
    lone = [
        {"part": "lone seat", "system": system, "run": run, "round": number, "tok_s": tok_s}
        for number in (1, 2, 3)
        for run, system, tok_s in (
            ("before", PLAIN, 100.0),
            ("ours", SEATS, ours_tok_s),
            ("after", PLAIN, 100.0),
        )
    ]
    rows = [{**row, "errors": 0, **_CLEAN} for row in shares + lone]
    return fairness.summarize({"seed": 1, "cases": [case]}, rows)


def test_fair_shares_and_an_unslowed_lone_seat_meet_the_targets() -> None:
    assert all(check.met for check in _fair(ratio=1.01, ours_tok_s=99.0).checks)


@pytest.mark.parametrize(("ratio", "ours_tok_s"), [(1.2, 99.0), (0.8, 99.0), (1.0, 90.0)])
def test_unfair_shares_or_a_slowed_lone_seat_miss_a_target(ratio: float, ours_tok_s: float) -> None:
    assert not all(check.met for check in _fair(ratio, ours_tok_s).checks)


@pytest.mark.parametrize("scenario", ["noisy", "fair"])
def test_a_report_is_json_and_a_picture(scenario: str, tmp_path: Path) -> None:
    result, plot = {
        "noisy": (_noisy({PLAIN: 4.0, SEATS: 1.0}), noisy_neighbour.plot),
        "fair": (_fair(1.0, 99.0), fairness.plot),
    }[scenario]
    data, table, picture = report.write(result, tmp_path, plot)
    assert table.read_text() == f"{result}\n"
    content = json.loads(data.read_text())
    assert content["environment"]["cpu_count"] >= 1
    assert len(content["rows"]) == len(result.rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_starved_load_generator_is_named() -> None:
    (note,) = report.instrument_notes([{"max_lag_s": 2.0, "idle_server_cores": 0.0}])
    assert "2.00 s" in note
    assert report.instrument_notes([{"max_lag_s": 0.01, "idle_server_cores": 0.01}]) == ()


def test_a_table_lines_up() -> None:
    lines = str(Table("title", ("name", "figure"), (("a", "1"), ("longer", "1,000")))).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    assert str(Check("target", "2", met=False)).startswith("NOT MET")


def test_every_seat_of_the_entitlements_may_always_serve(tmp_path: Path) -> None:
    seat = Seat("heavy", quantity=3)
    write_entitlements([seat, Seat("light")], tmp_path / "seats.json", guarantee_tok_s=20.0)
    snapshot = parse_entitlements((tmp_path / "seats.json").read_text())
    assert is_key(seat.key, KeyKind.BOOST)
    assert [pledge.quantity for pledge in snapshot.pledges] == [3, 1]
    assert snapshot.pledges[0].key_sha256 == key_sha256(seat.key)
    assert len(snapshot.pledges[0].blocks) == 3


_SERVE = """
import http.server, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def _launch(code: str, port: int) -> Launch:
    url = f"http://127.0.0.1:{port}"
    return Launch("small server", (sys.executable, "-c", code, str(port)), url, url)


def test_a_server_is_stopped_with_its_children(tmp_path: Path, unused_tcp_port: int) -> None:
    with running([_launch(_SERVE, unused_tcp_port)], tmp_path, lambda _text: None) as (server,):
        family = server._family()
        assert len(family) == 2
        assert server.cpu_s() > 0
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)


def test_a_server_that_ends_is_reported_with_its_log(tmp_path: Path, unused_tcp_port: int) -> None:
    code = "print('no such model'); raise SystemExit(3)"
    with (
        pytest.raises(ServerStartError, match=r"status 3(?s:.*)no such model"),
        running([_launch(code, unused_tcp_port)], tmp_path, lambda _text: None),
    ):
        pass


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "boosts bench noisy-neighbour" in capsys.readouterr().out
