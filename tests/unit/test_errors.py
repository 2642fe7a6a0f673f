"""Every error has an answer, and every code of the contract an error or a reason."""

from __future__ import annotations

import inspect

import orjson
import pytest

from orchestrator import errors
from orchestrator.api.errors import STATUS, error_response, invalid_request
from orchestrator.errors import OrchestratorError

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, OrchestratorError) and value is not errors.RecordedError
]


@pytest.mark.parametrize("error", CLASSES)
def test_every_code_has_a_status(error: type[OrchestratorError]) -> None:
    assert error.code in STATUS


def test_an_answer_has_code_message_and_details() -> None:
    response = error_response(errors.QuotaExceeded(7))
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert orjson.loads(bytes(response.body)) == {
        "error": {
            "code": "QUOTA_EXCEEDED",
            "message": "Product at max_engines limit (7).",
            "details": {"max_engines": 7},
        }
    }


@pytest.mark.parametrize(
    "error", [errors.DatabaseUnavailable(), errors.RateLimited(3), errors.BackendUnavailable("away")]
)
def test_what_may_succeed_later_says_when(error: OrchestratorError) -> None:
    assert int(error_response(error).headers["retry-after"]) >= 1


def test_a_defect_shows_its_request_and_nothing_else() -> None:
    response = error_response(errors.InternalError("the secret reason"), "req-1")
    assert response.status_code == 500
    body = orjson.loads(bytes(response.body))
    assert body["error"]["details"] == {"request_id": "req-1"}
    assert "secret reason" not in bytes(response.body).decode()


def test_a_recorded_error_answers_as_the_first_one_did() -> None:
    first = errors.BootTimeout("ann", 60)
    again = errors.RecordedError(orjson.loads(orjson.dumps(errors.error_record(first))))
    assert bytes(error_response(again).body) == bytes(error_response(first).body)
    assert error_response(again).status_code == 504


def test_invalid_input_names_the_first_field_and_lists_all() -> None:
    found = invalid_request(
        [
            {"loc": ("policy", "max_engines"), "msg": "Input should be a valid integer", "type": "int_type"},
            {"loc": ("extra",), "msg": "Extra inputs are not permitted", "type": "extra_forbidden"},
        ]
    )
    assert found.field == "policy.max_engines"
    assert found.details is not None
    assert [problem["field"] for problem in found.details["errors"]] == ["policy.max_engines", "extra"]
    assert found.details["errors"][1]["reason"] == "unknown field"
