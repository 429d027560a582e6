"""Renders chat templates in a process of its own: reads a JSON line, writes a JSON line.

A template is code of whoever made the checkpoint. Jinja's sandbox keeps it from the interpreter;
memory is bounded here, and time by the process that started this one, which ends it. It imports
nothing of this project, so that it starts quickly.
"""

import datetime
import json
import resource
import signal
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox

_MEMORY = 512 << 20  # bytes of address space
_LONGEST = 8 << 20  # characters of a rendered text


class Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}``: marks what training learns; here its text."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> jinja2.Environment:
    """The sandbox, with what transformers gives to templates."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def render(template: jinja2.Template, variables: dict) -> str:
    pieces, length = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > _LONGEST:
            raise ValueError(f"gives more than {_LONGEST} characters")
    return "".join(pieces)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    made, templates = environment(), {}
    for line in sys.stdin:
        try:
            source, variables = json.loads(line)
            if source not in templates:
                templates[source] = made.from_string(source)
            answer = {"text": render(templates[source], variables)}
        except MemoryError:
            answer = {"error": "requires too much memory"}
        except RecursionError:
            answer = {"error": "is nested too deep"}
        except Exception as error:  # whatever a template raises
            answer = {"error": str(error) or type(error).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
