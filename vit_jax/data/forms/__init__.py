"""The forms that data comes in, each opened by a function (argument, split) -> source.

Which string opens which is in `data.sources.SOURCES`.
"""
