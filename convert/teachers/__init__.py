"""Teachers: judges whose scores a student learns from. See :mod:`convert.teachers.score_file` for what they give."""
