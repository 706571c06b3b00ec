"""Where photographs lie: a folder, a list of files, archives, tables. An album names its pictures
and opens their bytes; what is in them is for images/picture_file.py to judge.
"""
