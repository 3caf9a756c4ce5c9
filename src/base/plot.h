// Line plots as SVG text, for reports that stand alone.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace dsla {

struct PlotSeries {
  std::string name;
  std::vector<std::pair<double, double>> points;  // by ascending x; what is not finite is left out
  bool markers = false;
};

struct PlotOptions {
  std::string title, x_label, y_label;
  bool log_y = false;  // values that are not positive are left out
  int width = 640, height = 320;
};

// An <svg> element. Text is escaped.
std::string LinePlot(const std::vector<PlotSeries>& series, const PlotOptions& options);

std::string EscapeHtml(const std::string& text);

}  // namespace dsla
