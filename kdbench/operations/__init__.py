"""What a stage may begin with: one change of its student, before the first step."""
