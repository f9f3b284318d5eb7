"""Code that trains the small models shipped with FastDiff; not part of the installed package."""
