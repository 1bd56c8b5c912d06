"""Whether a text is JSON of a given shape; nothing is fetched that a schema refers to."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import referencing

from phimlx.errors import TrainingError, shortened

Draft = jsonschema.Draft202012Validator  # of a schema that names none


class NotJSONError(Exception):
    """A text that is no JSON."""


class JSONSchema:
    """A JSON Schema that texts are held to.

    Args:
        name: what errors call it.

    Raises:
        TrainingError: where it is none.
    """

    def __init__(self, schema: Any, name: str) -> None:
        self._name = name
        try:
            kind = jsonschema.validators.validator_for(schema, Draft)
            kind.check_schema(schema)
        except (jsonschema.SchemaError, RecursionError, AttributeError, TypeError) as error:
            said = getattr(error, "message", str(error))
            raise TrainingError(f"{name} is no JSON Schema: {shortened(said)}.") from None
        self._validator = kind(schema, registry=referencing.Registry())

    def allows(self, text: str) -> bool:
        """Whether a text is valid under it.

        Raises:
            NotJSONError: where it is no JSON.
            TrainingError: where the schema refers to what is not in it.
        """
        try:
            value = json.loads(text)
            return bool(self._validator.is_valid(value))
        except (ValueError, RecursionError):
            raise NotJSONError from None
        except Exception as error:
            raise TrainingError(
                f"{self._name} cannot be applied: {shortened(str(error))}.",
                hint="Put everything that it refers to into it.",
            ) from None
