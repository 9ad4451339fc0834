"""The log as JSON lines, for machines that read it."""

import json
import logging
from datetime import UTC, datetime


class _JsonLines(logging.Formatter):
    """One JSON object for each record: time, level, message, and what is known of a request, never texts."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = datetime.fromtimestamp(record.created, tz=UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_json_lines() -> None:
    """Let the root logger's handlers write JSON lines, with one for each request."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_JsonLines())
    # Lines of requests are records of the level debug, so that text logs stay quiet.
    logging.getLogger("full_stack_transformer.serving.http.guard").setLevel(logging.DEBUG)
