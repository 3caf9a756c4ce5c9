# Run as a script (cmake -P) with FOLDER, OUTPUT and FILES (names separated by ','): writes a C++ source that defines
# dsla::UiAssets() over the bytes of these files.
string(REPLACE "," ";" names "${FILES}")
set(arrays "")
set(entries "")
set(index 0)
foreach(name ${names})
  file(READ ${FOLDER}/${name} hex HEX)
  file(SHA256 ${FOLDER}/${name} digest)
  string(SUBSTRING ${digest} 0 32 digest)
  string(REGEX REPLACE "(..)" "0x\\1," bytes "${hex}")
  # Eight bytes a line: compilers dislike endless ones.
  string(REGEX REPLACE "((0x..,)(0x..,)(0x..,)(0x..,)(0x..,)(0x..,)(0x..,)(0x..,))" "\\1\n" bytes "${bytes}")
  get_filename_component(extension ${name} LAST_EXT)
  if(extension STREQUAL ".html")
    set(type "text/html; charset=utf-8")
  elseif(extension STREQUAL ".js")
    set(type "text/javascript; charset=utf-8")
  elseif(extension STREQUAL ".css")
    set(type "text/css; charset=utf-8")
  elseif(extension STREQUAL ".svg")
    set(type "image/svg+xml")
  elseif(extension STREQUAL ".json")
    set(type "application/json")
  elseif(extension STREQUAL ".png")
    set(type "image/png")
  else()
    message(FATAL_ERROR "${FOLDER}/${name}: no media type is known for ${extension}")
  endif()
  set(path "/${name}")
  if(name STREQUAL "index.html")
    set(path "/")
  endif()
  string(APPEND arrays "const unsigned char kFile${index}[] = {\n${bytes}};\n")
  string(APPEND entries "    {\"${path}\", \"${type}\", \"\\\"${digest}\\\"\", Bytes(kFile${index}, sizeof(kFile${index}))},\n")
  math(EXPR index "${index} + 1")
endforeach()
file(WRITE ${OUTPUT} "#include \"server/ui_assets.h\"\n\nnamespace dsla {\nnamespace {\n\n${arrays}
std::string_view Bytes(const unsigned char* bytes, size_t size) {
  return {reinterpret_cast<const char*>(bytes), size};
}

}  // namespace

std::span<const UiAsset> UiAssets() {
  static const UiAsset kAssets[] = {
${entries}  };
  return kAssets;
}

}  // namespace dsla
")
