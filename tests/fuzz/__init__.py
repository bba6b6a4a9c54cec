"""Strangers' bytes, by the million: whatever they are, a parser answers with what it read, or with an `ExportError`.

`make fuzz` looks for bytes that it does not, guided by which lines they reach (atheris); `test_targets` tries some.
"""
