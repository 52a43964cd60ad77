"""The one exception that a wrong request raises, wherever it is found out."""


class ApeRequestError(ValueError):
    """A request that cannot be served, and the field that is to blame.

    A subclass of ValueError, so that SGLang's own entry points treat it as bad input.

    Args:
        message: what was wrong, with the offending value or numbers.
        param: the field as the caller wrote it, e.g. ``contexts[3]`` or ``ape.temperature``.
        status_code: the HTTP status of the answer.
    """

    def __init__(self, message: str, param: str | None, status_code: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status_code = status_code

    def body(self) -> dict[str, object]:
        """The HTTP answer: ``{"error": {"message", "type", "param", "code"}}``."""
        return {
            "error": {
                "message": str(self),
                "type": "invalid_request_error",
                "param": self.param,
                "code": self.status_code,
            }
        }
