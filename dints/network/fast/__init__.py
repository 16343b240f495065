"""Faster forms of plain networks, with the same parameters and results, behind
`acceleration.accelerate`.
"""
